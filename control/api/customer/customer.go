// Package customer is the contract of the customer API, /api/customer/v1: openapi.yaml, what oapi-codegen makes of it
// (customer.gen.go, by `go generate`; a test makes it again and compares), and the few types that a generator cannot make.
// Within v1, fields and operations are only ever added: ../README.md has the policy.
//
// Every operation of openapi.yaml carries
//
//	x-varve-roles   who may call it: roles, or `signed-in`, or `anyone`
//	x-varve-cli     the command line that does the same, or "none: " and the reason
//	x-varve-scope   vpool, if callers that are bound to some vPools may call it too
package customer

import (
	_ "embed"
	"encoding/json"

	"varve/control/bytesize"
)

//go:generate go run github.com/oapi-codegen/oapi-codegen/v2/cmd/oapi-codegen@v2.8.2 -config generate.yaml openapi.yaml

// Spec is openapi.yaml.
//
//go:embed openapi.yaml
var Spec []byte

// Prefix of every path.
const Prefix = "/api/customer/v1"

// Size in bytes.
type Size int64

// UnmarshalJSON takes a number of bytes or a string with a unit.
func (s *Size) UnmarshalJSON(b []byte) error {
	var n int64
	if len(b) > 0 && b[0] != '"' {
		if err := json.Unmarshal(b, &n); err != nil {
			return err
		}
		*s = Size(n)
		return nil
	}
	var text string
	if err := json.Unmarshal(b, &text); err != nil {
		return err
	}
	n, err := bytesize.Parse(text)
	*s = Size(n)
	return err
}

// Error makes a Problem an error of the client.
func (p *Problem) Error() string {
	if p.Detail != "" {
		return p.Detail
	}
	return p.Title
}
