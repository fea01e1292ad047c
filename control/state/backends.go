package state

import (
	"fmt"
	"path"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/google/uuid"
)

// Backend says where a vPool's objects are. Which fields count depends on Kind; the others are zero.
type Backend struct {
	Kind string `json:"kind"`
	// Node is the one whose disk it is; nil UUID where every node reaches it.
	Node uuid.UUID `json:"node,omitzero"`
	Dir  string    `json:"dir,omitempty"`

	// Endpoint is http://host[:port] or https://host[:port], without a default port.
	Endpoint string `json:"endpoint,omitempty"`
	Region   string `json:"region,omitempty"`
	Bucket   string `json:"bucket,omitempty"`
	Prefix   string `json:"prefix,omitempty"`
	// CA is the PEM of the only authorities to trust; "" for those of the system.
	CA string `json:"ca,omitempty"`
	// Unsafe says that the operator takes a store that the probe found to lack what a vPool should have.
	Unsafe bool `json:"unsafe,omitempty"`
}

// Kinds of backends.
const (
	BackendLocal = "local" // a directory of a node
	BackendS3    = "s3"    // a bucket
)

// Limits of a backend.
const (
	backendTextMax  = 512
	backendCAMax    = 32 << 10
	FindingsMax     = 32
	FindingBytesMax = 512
)

// Finding is something that the probe of a backend tried, and what came of it.
type Finding struct {
	Check string `json:"check"`
	Found string `json:"found"`
}

func checkFindings(object string, findings []Finding) error {
	if len(findings) > FindingsMax {
		return invalid(object, fmt.Sprintf("%d findings", len(findings)))
	}
	for _, f := range findings {
		if len(f.Check)+len(f.Found) > FindingBytesMax || !utf8.ValidString(f.Check) || !utf8.ValidString(f.Found) {
			return invalid(object, "finding too long or not UTF-8")
		}
	}
	return nil
}

// Check refuses what cannot be a backend. object is what an error is about.
func (b Backend) Check(object string) error {
	switch b.Kind {
	case BackendLocal:
		if !path.IsAbs(b.Dir) || path.Clean(b.Dir) != b.Dir || b.Dir == "/" || len(b.Dir) > TargetBytesMax || !utf8.ValidString(b.Dir) {
			return &Error{Err: ErrInvalid, Object: object, Field: "backend", Detail: "backend directory " + quote(b.Dir) + " is not a clean absolute path",
				Remedy: "use local:///directory"}
		}
		if b != (Backend{Kind: BackendLocal, Node: b.Node, Dir: b.Dir}) {
			return invalid(object, "a directory has no endpoint, bucket or authority")
		}
		return nil
	case BackendS3:
		return b.checkS3(object)
	}
	return &Error{Err: ErrInvalid, Object: object, Field: "backend", Detail: "backend kind " + quote(b.Kind) + " is not known",
		Remedy: "use local:///directory or " + s3Form}
}

func (b Backend) checkS3(object string) error {
	switch {
	case !endpoint(b.Endpoint):
		return &Error{Err: ErrInvalid, Object: object, Field: "backend", Detail: "endpoint " + quote(b.Endpoint) + " is not http://host[:port] or https://host[:port]",
			Remedy: "use " + s3Form}
	case !bucketName(b.Bucket):
		return &Error{Err: ErrInvalid, Object: object, Field: "backend", Detail: "bucket " + quote(b.Bucket) + " is not the name of one",
			Remedy: "3 to 63 of a-z, 0-9, '.' and '-'"}
	case b.Prefix != "" && (strings.Trim(b.Prefix, "/") != b.Prefix || path.Clean(b.Prefix) != b.Prefix || b.Prefix == "." ||
		strings.HasPrefix(b.Prefix, "../") || b.Prefix == "..") || len(b.Prefix) > backendTextMax || !utf8.ValidString(b.Prefix):
		return &Error{Err: ErrInvalid, Object: object, Field: "backend", Detail: "prefix " + quote(b.Prefix) + " is not a clean path", Remedy: "use " + s3Form}
	case len(b.Region) > 64 || strings.ContainsFunc(b.Region, func(r rune) bool { return r <= ' ' || r > '~' }):
		return invalid(object, "region "+quote(b.Region)+" is not the name of one")
	case len(b.CA) > backendCAMax || !utf8.ValidString(b.CA):
		return invalid(object, fmt.Sprintf("authorities of %d bytes, more than %d, or not PEM", len(b.CA), backendCAMax))
	case b.Dir != "" || b.Node != uuid.Nil:
		return invalid(object, "a bucket has no directory and no node")
	}
	return nil
}

// endpoint says whether s is http://host[:port] or https://host[:port] in lower case.
func endpoint(s string) bool {
	host, ok := strings.CutPrefix(s, "https://")
	if !ok {
		host, ok = strings.CutPrefix(s, "http://")
	}
	return ok && host != "" && host[0] != ':' && len(s) <= backendTextMax && !strings.ContainsFunc(host, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || strings.ContainsRune(".-_:[]", r))
	})
}

func bucketName(s string) bool {
	return len(s) >= 3 && len(s) <= 63 && !strings.ContainsFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '.' || r == '-')
	})
}

const s3Form = "s3://bucket/prefix?endpoint=https://host:port&region=name"

// Overlaps says whether two backends share storage: the same directory or prefix, or one inside the other.
func (b Backend) Overlaps(o Backend) bool {
	if b.Kind != o.Kind || b.Node != o.Node || b.Endpoint != o.Endpoint || b.Bucket != o.Bucket {
		return false
	}
	if b.Kind == BackendS3 {
		return inside(b.Prefix, o.Prefix) || inside(o.Prefix, b.Prefix)
	}
	return inside(b.Dir, o.Dir) || inside(o.Dir, b.Dir)
}

// inside says whether path p is dir or below it; everything is below "".
func inside(p, dir string) bool { return dir == "" || strings.HasPrefix(p+"/", dir+"/") }

// SetVPoolFindings notes what a later probe of a vPool's backend found.
type SetVPoolFindings struct {
	ID       uuid.UUID `json:"id"`
	Findings []Finding `json:"findings"`
}

func (*SetVPoolFindings) kind() (string, int) { return "set_vpool_findings", 1 }

func (c *SetVPoolFindings) check() error { return checkFindings("vpool "+c.ID.String(), c.Findings) }

func (c *SetVPoolFindings) apply(t *tx) (Result, error) {
	p, err := t.VPoolByID(c.ID)
	if err != nil {
		return Result{}, err
	}
	p.Findings, p.Rev = slices.Clone(c.Findings), t.index
	t.put(tVPool, &p)
	return Result{Pool: p.ID}, nil
}
