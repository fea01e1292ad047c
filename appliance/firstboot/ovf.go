package firstboot

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"strings"
)

// Limits of an OVF environment: ESXi's is a few KiB.
const (
	ovfBytesMax      = 64 << 10
	ovfDepthMax      = 16
	ovfPropertiesMax = 256
)

const (
	ovfNamespace = "http://schemas.dmtf.org/ovf/environment/1"
	ovfPrefix    = "guestinfo.varve."
)

// parseOVF reads the properties of an OVF environment document (DSP0243, 9.1): Environment/PropertySection/Property with the
// attributes key and value. Those of other VMs, in Entity, are none of ours. Only our keys are returned, without the prefix,
// those without a value left out.
func parseOVF(b []byte) (map[string]string, error) {
	if len(b) > ovfBytesMax {
		return nil, fmt.Errorf("OVF environment of more than %d bytes", ovfBytesMax)
	}
	d := xml.NewDecoder(bytes.NewReader(b))
	d.Strict = true
	d.Entity = nil // no entities but XML's own
	out := make(map[string]string)
	var path []string
	seen := 0
	for {
		tok, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("OVF environment: %w", err)
		}
		switch t := tok.(type) {
		case xml.Directive:
			return nil, errors.New("OVF environment: a document type is not accepted")
		case xml.StartElement:
			if path = append(path, t.Name.Local); len(path) > ovfDepthMax {
				return nil, fmt.Errorf("OVF environment: more than %d levels", ovfDepthMax)
			}
			if len(path) == 1 && (t.Name.Local != "Environment" || t.Name.Space != ovfNamespace) {
				return nil, fmt.Errorf("OVF environment: the document is a %q", clip(t.Name.Local))
			}
			if len(path) != 3 || path[1] != "PropertySection" || path[2] != "Property" {
				continue
			}
			if seen++; seen > ovfPropertiesMax {
				return nil, fmt.Errorf("OVF environment: more than %d properties", ovfPropertiesMax)
			}
			name, value := "", ""
			for _, a := range t.Attr {
				switch {
				case a.Name.Space != ovfNamespace:
				case a.Name.Local == "key":
					name = a.Value
				case a.Name.Local == "value":
					value = a.Value
				}
			}
			if k, ours := strings.CutPrefix(name, ovfPrefix); ours && strings.TrimSpace(value) != "" {
				out[k] = value
			}
		case xml.EndElement:
			path = path[:len(path)-1]
		}
	}
	if seen == 0 && len(b) == 0 {
		return nil, errors.New("OVF environment: nothing in it")
	}
	return out, nil
}
