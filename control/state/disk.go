package state

import (
	"strings"
	"unicode/utf8"
)

const (
	rawSuffix  = ".raw"
	flatSuffix = "-flat.vmdk"
)

// diskStem takes the disk suffix off a file name. A stem that is empty or ends in a disk suffix itself is no disk's, so a
// name with a suffix is always a file's and a name without one is always a disk's.
func diskStem(name string) (stem string, ok bool) {
	stem, ok = cutDiskSuffix(name)
	if !ok || stem == "" {
		return "", false
	}
	if _, again := cutDiskSuffix(stem); again {
		return "", false
	}
	return stem, true
}

func cutDiskSuffix(name string) (string, bool) {
	if stem, ok := strings.CutSuffix(name, rawSuffix); ok {
		return stem, true
	}
	return strings.CutSuffix(name, flatSuffix)
}

// siblingDisk is the other file name with the same disk name: of `x.raw` it is `x-flat.vmdk`, and the other way round.
func siblingDisk(name string) (string, bool) {
	stem, ok := diskStem(name)
	if !ok {
		return "", false
	}
	if strings.HasSuffix(name, rawSuffix) {
		return stem + flatSuffix, true
	}
	return stem + rawSuffix, true
}

// IsDisk says whether a file of this name (or path) is a vDisk: it ends in `.raw` or `-flat.vmdk`, something stands before
// the suffix, and that does not end in such a suffix again.
func IsDisk(name string) bool {
	_, ok := diskStem(name[strings.LastIndexByte(name, '/')+1:])
	return ok
}

// DiskName is the name of the vDisk at a path of a vPool: "/vm/a.raw" and "/vm/a-flat.vmdk" are "vm/a". ok is false where
// the file is no disk.
func DiskName(path string) (name string, ok bool) {
	dir, file := path[:strings.LastIndexByte(path, '/')+1], path[strings.LastIndexByte(path, '/')+1:]
	stem, ok := diskStem(file)
	if !ok {
		return "", false
	}
	return strings.TrimPrefix(dir, "/") + stem, true
}

// DiskFile is the path of the file that a new vDisk of this name gets: "vm/a" becomes "/vm/a.raw". A name that already
// is a disk's file name is kept.
func DiskFile(name string) string {
	name = "/" + strings.TrimPrefix(name, "/")
	if IsDisk(name) {
		return name
	}
	return name + rawSuffix
}

// SplitName takes "pool/path" apart. ok is false where either part is missing.
func SplitName(name string) (pool, path string, ok bool) {
	pool, path, ok = strings.Cut(strings.TrimPrefix(name, "/"), "/")
	return pool, path, ok && pool != "" && path != ""
}

// checkName refuses what cannot be a name in a directory. Names are UTF-8: a console and an object store must show them.
func checkName(name string) error {
	switch {
	case len(name) > NameBytesMax:
		return &Error{Err: ErrNameTooLong, Object: "name " + quote(name[:32]) + "…", Detail: "more than 255 bytes"}
	case name == "" || name == "." || name == "..":
		return invalid("name "+quote(name), "not a name an entry can have")
	case strings.ContainsAny(name, "/\x00"):
		return invalid("name "+quote(name), "contains '/' or NUL")
	case !utf8.ValidString(name):
		return invalid("name "+quote(name), "not valid UTF-8")
	}
	return nil
}

// checkLabel is the rule for names of vPools, nodes and tokens: [a-z0-9][a-z0-9._-]{0,62}.
func checkLabel(what, name string) error {
	ok := len(name) >= 1 && len(name) <= 63
	for i := 0; ok && i < len(name); i++ {
		c := name[i]
		alnum := c >= 'a' && c <= 'z' || c >= '0' && c <= '9'
		ok = alnum || i > 0 && (c == '.' || c == '_' || c == '-')
	}
	if !ok {
		if len(name) > 80 {
			name = name[:80] + "…"
		}
		return &Error{Err: ErrInvalid, Object: what + " " + quote(name), Field: "name", Detail: "not a valid name",
			Remedy: "use 1 to 63 of a-z, 0-9, '.', '_' and '-', starting with a letter or digit"}
	}
	return nil
}
