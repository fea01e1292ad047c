package vmconfig

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
)

// element is an open element of a document: where its content begins, and its attributes.
type element struct {
	name    string
	attrs   map[string]string
	begin   int64 // of its tag
	content int64 // behind its tag
}

// visitor is called at the end of every element, with the path to it and the text directly in it.
type visitor func(path []element, text string, contentEnd, end int64) error

// walk goes through a document. What it opens is bounded; entities other than XML's own five are errors.
func walk(b []byte, open func(path []element) error, visit visitor) error {
	d := xml.NewDecoder(bytes.NewReader(b))
	d.Strict = true
	d.CharsetReader = func(string, io.Reader) (io.Reader, error) { return nil, errors.New("only UTF-8 is read") }
	var path []element
	var texts []string
	for n := 0; ; n++ {
		begin := d.InputOffset()
		tok, err := d.RawToken()
		if errors.Is(err, io.EOF) && len(path) == 0 {
			return nil
		}
		if err != nil {
			return fmt.Errorf("XML: %w", err)
		}
		if n == tokensMax {
			return fmt.Errorf("more than %d tokens", tokensMax)
		}
		switch t := tok.(type) {
		case xml.Directive:
			return errors.New("a document type is not read")
		case xml.StartElement:
			if len(path) == depthMax {
				return fmt.Errorf("more than %d levels", depthMax)
			}
			e := element{name: qualified(t.Name), attrs: make(map[string]string), begin: begin, content: d.InputOffset()}
			for _, a := range t.Attr {
				e.attrs[qualified(a.Name)] = a.Value
			}
			path, texts = append(path, e), append(texts, "")
			if open != nil {
				if err := open(path); err != nil {
					return err
				}
			}
		case xml.CharData:
			if n := len(texts); n > 0 && len(texts[n-1]) < 2*textBytesMax {
				texts[n-1] += string(t)
			}
		case xml.EndElement:
			if len(path) == 0 || path[len(path)-1].name != qualified(t.Name) {
				return errors.New("an element ends that has not begun")
			}
			if err := visit(path, strings.TrimSpace(texts[len(texts)-1]), begin, d.InputOffset()); err != nil {
				return err
			}
			path, texts = path[:len(path)-1], texts[:len(texts)-1]
		}
	}
}

func qualified(n xml.Name) string {
	if n.Space != "" {
		return n.Space + ":" + n.Local
	}
	return n.Local
}

func at(path []element, names ...string) bool {
	return len(path) == len(names) && slices.EqualFunc(path, names, func(e element, name string) bool { return e.name == name })
}

func parseDomain(b []byte) (Config, error) {
	var c Config
	isDomain := false
	var disk Disk
	var removable bool
	err := walk(b, func(path []element) error {
		if len(path) == 1 {
			if isDomain || path[0].name != "domain" {
				return fmt.Errorf("its root is <%.40s>", path[0].name)
			}
			isDomain = true
		}
		if at(path, "domain", "devices", "disk") {
			dev := path[2].attrs["device"]
			disk, removable = Disk{}, dev != "" && dev != "disk"
		}
		return nil
	}, func(path []element, text string, _, _ int64) error {
		attrs := path[len(path)-1].attrs
		switch {
		case at(path, "domain", "name"):
			c.Name = text
		case at(path, "domain", "uuid"):
			c.UUID = canonicalUUID(text)
		case at(path, "domain", "memory"):
			c.Memory = memory(text, attrs["unit"])
		case at(path, "domain", "vcpu"):
			if n, err := strconv.Atoi(text); err == nil && n >= 0 && n < 1<<16 {
				c.VCPUs = n
			}
		case at(path, "domain", "os", "type"):
			c.Guest = text
		case at(path, "domain", "devices", "disk", "source"):
			disk.Kind, disk.File = source(path[2].attrs["type"], attrs)
		case at(path, "domain", "devices", "disk", "target"):
			disk.Label = attrs["dev"]
		case at(path, "domain", "devices", "disk"):
			if removable || disk.File == "" {
				return nil
			}
			if len(c.Disks) == disksMax || len(disk.File) > textBytesMax {
				return fmt.Errorf("more than %d disks, or a path of more than %d bytes", disksMax, textBytesMax)
			}
			disk.File = strings.ToValidUTF8(disk.File, "\uFFFD")
			c.Disks = append(c.Disks, disk)
		}
		return nil
	})
	if err == nil && !isDomain {
		err = errors.New("it has no root")
	}
	if err != nil {
		return Config{}, fmt.Errorf("%w: %w", ErrNoVM, err)
	}
	return c, nil
}

// source says where a disk's bytes are.
func source(typ string, attrs map[string]string) (kind, file string) {
	switch {
	case typ == "file" || typ == "" && attrs["file"] != "":
		return InFile, attrs["file"]
	case typ == "network" && attrs["protocol"] == "nbd":
		return OnNBD, attrs["name"]
	case typ == "volume":
		return InPool, attrs["pool"] + "/" + attrs["volume"]
	case typ == "block":
		return Elsewhere, attrs["dev"]
	case typ == "network":
		return Elsewhere, attrs["protocol"] + ":" + attrs["name"]
	}
	return Elsewhere, ""
}

// memory reads libvirt's sizes; a number without a unit is KiB.
func memory(text, unit string) int64 {
	n, err := strconv.ParseInt(text, 10, 64)
	factor := map[string]int64{"": 1 << 10, "b": 1, "bytes": 1, "KB": 1000, "k": 1 << 10, "KiB": 1 << 10, "MB": 1e6, "M": 1 << 20, "MiB": 1 << 20,
		"GB": 1e9, "G": 1 << 30, "GiB": 1 << 30, "TB": 1e12, "T": 1 << 40, "TiB": 1 << 40}[unit]
	if err != nil || n < 0 || factor == 0 || n > (1<<60)/factor {
		return 0
	}
	return n * factor
}

// edit replaces the bytes from..to of a document.
type edit struct {
	from, to int64
	with     string
}

func rewriteDomain(b []byte, c Copy) ([]byte, error) {
	var edits []edit
	escaped := func(s string) string {
		var out bytes.Buffer
		_ = xml.EscapeText(&out, []byte(s)) // a buffer takes everything
		return out.String()
	}
	drop := func(path []element, end int64) {
		edits = append(edits, edit{path[len(path)-1].begin, end, ""})
	}
	hasUUID := false
	var nameEnd int64
	err := walk(b, nil, func(path []element, text string, contentEnd, end int64) error {
		e := path[len(path)-1]
		switch {
		case at(path, "domain", "name"):
			nameEnd = end
			edits = append(edits, edit{e.begin, end, "<name>" + escaped(c.Name) + "</name>"})
		case at(path, "domain", "uuid"):
			hasUUID = true
			edits = append(edits, edit{e.begin, end, "<uuid>" + c.UUID.String() + "</uuid>"})
		case at(path, "domain", "genid"), at(path, "domain", "os", "nvram"), at(path, "domain", "devices", "interface", "mac"):
			drop(path, end) // libvirt makes them anew
		case at(path, "domain", "devices", "disk", "source"):
			_, file := source(path[2].attrs["type"], e.attrs)
			to := c.Files[file]
			if to == "" {
				return nil
			}
			tag, ok := retag(b[e.begin:e.content], placed(path[2].attrs["type"], to), escaped)
			if !ok {
				return fmt.Errorf("source of disk %.80q cannot be changed", file)
			}
			edits = append(edits, edit{e.begin, e.content, tag})
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if nameEnd == 0 {
		return nil, fmt.Errorf("a domain without a name: %w", ErrNoVM)
	}
	if !hasUUID {
		edits = append(edits, edit{nameEnd, nameEnd, "<uuid>" + c.UUID.String() + "</uuid>"})
	}
	slices.SortStableFunc(edits, func(a, b edit) int { return int(a.from - b.from) })
	var out bytes.Buffer
	var done int64
	for _, e := range edits {
		if e.from < done {
			continue // inside one that is dropped
		}
		out.Write(b[done:e.from])
		out.WriteString(e.with)
		done = e.to
	}
	out.Write(b[done:])
	return out.Bytes(), nil
}

// placed gives the attributes that say where a disk of a type is.
func placed(typ, to string) map[string]string {
	switch typ {
	case "network":
		return map[string]string{"name": to}
	case "volume":
		pool, volume, _ := strings.Cut(to, "/")
		return map[string]string{"pool": pool, "volume": volume}
	}
	return map[string]string{"file": to}
}

// retag replaces values of attributes in the bytes of a tag and leaves everything else in it.
func retag(tag []byte, values map[string]string, escaped func(string) string) (string, bool) {
	var out strings.Builder
	i, replaced := 0, 0
	for i < len(tag) && tag[i] != ' ' && tag[i] != '\t' && tag[i] != '\n' && tag[i] != '\r' && tag[i] != '>' && tag[i] != '/' {
		i++
	}
	out.Write(tag[:i])
	for i < len(tag) {
		start := i
		for i < len(tag) && strings.IndexByte(" \t\r\n", tag[i]) >= 0 {
			i++
		}
		name := i
		for i < len(tag) && strings.IndexByte(" \t\r\n=>/", tag[i]) < 0 {
			i++
		}
		key := string(tag[name:i])
		for i < len(tag) && strings.IndexByte(" \t\r\n=", tag[i]) >= 0 {
			i++
		}
		if key == "" || i >= len(tag) || tag[i] != '"' && tag[i] != '\'' {
			out.Write(tag[start:]) // the tag's end
			break
		}
		q := tag[i]
		end := bytes.IndexByte(tag[i+1:], q)
		if end < 0 {
			return "", false
		}
		if to, ok := values[key]; ok {
			out.Write(tag[start : i+1])
			out.WriteString(escaped(to))
			out.WriteByte(q)
			replaced++
		} else {
			out.Write(tag[start : i+2+end])
		}
		i += 2 + end
	}
	return out.String(), replaced == len(values)
}
