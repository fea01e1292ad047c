// Package internal is the contract of the internal API, /api/internal, which the console uses beside the customer API: openapi.yaml
// and what oapi-codegen makes of it (internal.gen.go, by `go generate`). It promises nothing to anybody else.
//
// Its operations carry the extensions of the customer API's, and
//
//	x-varve-local   true, if only the appliance's own socket takes it
package internal

import _ "embed"

//go:generate go run github.com/oapi-codegen/oapi-codegen/v2/cmd/oapi-codegen@v2.8.2 -config generate.yaml openapi.yaml

// Spec is openapi.yaml.
//
//go:embed openapi.yaml
var Spec []byte

// Prefix of every path.
const Prefix = "/api/internal"
