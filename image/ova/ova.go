package ova

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"strings"
	"time"
)

// ustar has eleven octal digits for a file's length; longer ones need extensions that Xen Orchestra misreads.
const fileBytesMax = 8<<30 - 1

// Write writes the OVA: descriptor, manifest, disk. base names the first two; when is the time of all three. disk is read twice,
// for its digest and for its bytes.
func Write(w io.Writer, a Appliance, base string, disk io.ReaderAt, when time.Time) error {
	text, err := a.Descriptor()
	if err != nil {
		return err
	}
	if strings.HasPrefix(base, ".") || strings.HasPrefix(a.SystemDisk, ".") || len(base) > 90 || len(a.SystemDisk) > 99 {
		return fmt.Errorf("names %q and %q: too long for ustar, or hidden", base, a.SystemDisk)
	}
	if a.SystemFile > fileBytesMax {
		return fmt.Errorf("%s has %d bytes, ustar takes %d", a.SystemDisk, a.SystemFile, int64(fileBytesMax))
	}
	return writeArchive(w, text, a, base, disk, when)
}

func writeArchive(w io.Writer, text []byte, a Appliance, base string, disk io.ReaderAt, when time.Time) error {
	digest := sha256.New()
	if n, err := io.Copy(digest, io.NewSectionReader(disk, 0, a.SystemFile)); err != nil || n != a.SystemFile {
		return fmt.Errorf("read %s: %d of %d bytes: %w", a.SystemDisk, n, a.SystemFile, err)
	}
	manifest := fmt.Sprintf("SHA256(%s.ovf)= %x\nSHA256(%s)= %x\n", base, sha256.Sum256(text), a.SystemDisk, digest.Sum(nil))

	t := tar.NewWriter(w)
	for _, f := range []struct {
		name   string
		length int64
		from   io.Reader
	}{
		{base + ".ovf", int64(len(text)), bytes.NewReader(text)},
		{base + ".mf", int64(len(manifest)), strings.NewReader(manifest)},
		{a.SystemDisk, a.SystemFile, io.NewSectionReader(disk, 0, a.SystemFile)},
	} {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: f.name, Size: f.length, Mode: 0o644, ModTime: when.UTC().Truncate(time.Second), Format: tar.FormatUSTAR}
		if err := t.WriteHeader(h); err != nil {
			return fmt.Errorf("write %s into the OVA: %w", f.name, err)
		}
		if _, err := io.Copy(t, f.from); err != nil {
			return fmt.Errorf("write %s into the OVA: %w", f.name, err)
		}
	}
	return t.Close()
}
