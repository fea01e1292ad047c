package transfer

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"varve/appliance/nbdclient"
)

// Format is a disk image format by qemu-img's name.
type Format string

// The formats that an import recognises and an export writes.
const (
	Raw   Format = "raw"
	QCOW2 Format = "qcow2"
	VMDK  Format = "vmdk"
	VHDX  Format = "vhdx"
)

// Formats are all of them.
var Formats = []Format{Raw, QCOW2, VMDK, VHDX}

// ParseFormat reads a format's name. The empty string stays empty.
func ParseFormat(s string) (Format, error) {
	for _, f := range append(Formats, "") {
		if strings.EqualFold(s, string(f)) {
			return f, nil
		}
	}
	return "", &Error{fmt.Errorf("image format %q is unknown", s), "use raw, qcow2, vmdk or vhdx"}
}

const (
	qemuOutputBytesMax = 1 << 20
	qemuStopGrace      = 5 * time.Second
)

// image is a source after inspection.
type image struct {
	source string
	format Format
	uri    bool
	size   int64
}

// native says that qemu-img is not needed.
func (i image) native() bool { return i.format == Raw }

func (i image) open(ctx context.Context) (Source, error) {
	if !i.uri {
		return openRaw(i.source)
	}
	t, err := nbdclient.ParseURI(i.source)
	if err != nil {
		return nil, err
	}
	return nbdclient.Dial(ctx, t)
}

// inspect finds the source's format and size.
func inspect(ctx context.Context, source string, opt ImportOptions) (image, error) {
	img := image{source: source, format: opt.Format, uri: nbdclient.IsURI(source)}
	if strings.Contains(source, "://") && !img.uri {
		return img, &Error{fmt.Errorf("source %q has an unknown scheme", source), "give a file, or an nbd://, nbds:// or nbd+unix:// URI"}
	}
	if img.uri {
		if img.format != "" && img.format != Raw {
			return img, &Error{errors.New("an NBD export is read as raw"), "leave --format out"}
		}
		img.format = Raw
	} else if img.format == "" {
		var err error
		if img.format, err = detect(source); err != nil {
			return img, err
		}
	}
	if img.native() {
		src, err := img.open(ctx)
		if err != nil {
			return img, err
		}
		img.size = src.Size()
		return img, src.Close()
	}
	info, err := qemuInfo(ctx, img)
	if err != nil {
		return img, err
	}
	img.size = info.VirtualSize
	if ref := info.foreign(source); ref != "" && !opt.AllowBacking {
		return img, &Error{fmt.Errorf("%s refers to another file, %q", source, ref),
			"flatten it with qemu-img convert, or give --allow-backing if you trust the image"}
	}
	return img, nil
}

// detect tells a format by the magic at the start of the file. A guest that writes such a magic to its raw disk makes the
// file look like that format; --format raw overrides, and references to other files are refused in any case.
func detect(path string) (Format, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	head := make([]byte, 512)
	n, err := io.ReadFull(f, head)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return "", err
	}
	head = head[:n]
	switch {
	case bytes.HasPrefix(head, []byte("QFI\xfb")):
		return QCOW2, nil
	case bytes.HasPrefix(head, []byte("KDMV")), bytes.HasPrefix(head, []byte("COWD")),
		bytes.HasPrefix(head, []byte("# Disk DescriptorFile")):
		return VMDK, nil
	case bytes.HasPrefix(head, []byte("vhdxfile")):
		return VHDX, nil
	}
	return Raw, nil
}

// qemuImageInfo is the part of `qemu-img info --output=json` that matters here.
type qemuImageInfo struct {
	VirtualSize     int64  `json:"virtual-size"`
	BackingFilename string `json:"backing-filename"`
	FormatSpecific  struct {
		Data struct {
			DataFile string `json:"data-file"`
			Extents  []struct {
				Filename string `json:"filename"`
			} `json:"extents"`
		} `json:"data"`
	} `json:"format-specific"`
}

// foreign gives the first file outside of the image's own directory, or any backing file, that the image refers to.
func (i qemuImageInfo) foreign(source string) string {
	if i.BackingFilename != "" {
		return i.BackingFilename
	}
	if i.FormatSpecific.Data.DataFile != "" {
		return i.FormatSpecific.Data.DataFile
	}
	dir, err := filepath.Abs(filepath.Dir(source))
	if err != nil {
		return source
	}
	for _, e := range i.FormatSpecific.Data.Extents {
		name, err := filepath.Abs(e.Filename)
		if err != nil || filepath.Dir(name) != dir {
			return e.Filename
		}
		if fi, err := os.Lstat(name); err != nil || !fi.Mode().IsRegular() {
			return e.Filename
		}
	}
	return ""
}

func qemuInfo(ctx context.Context, img image) (qemuImageInfo, error) {
	var info qemuImageInfo
	out, err := qemuImg(ctx, nil, "info", "--output=json", "-f", string(img.format), fileArgument(img.source))
	if err != nil {
		return info, err
	}
	if err := json.Unmarshal(out, &info); err != nil {
		return info, fmt.Errorf("read what qemu-img says of %s: %w", img.source, err)
	}
	if info.VirtualSize <= 0 {
		return info, fmt.Errorf("qemu-img gives no size for %s", img.source)
	}
	return info, nil
}

// convertIn has qemu-img write the image into our export, which is new and reads as zeros.
func convertIn(ctx context.Context, img image, t nbdclient.Target, progress Progress) error {
	uri, err := qemuURI(t)
	if err != nil {
		return err
	}
	_, err = qemuImg(ctx, percent(img.size, progress), "convert", "-p", "-n", "--target-is-zero", "-W",
		"-f", string(img.format), "-O", "raw", fileArgument(img.source), uri)
	return err
}

// convertOut has qemu-img read our export.
func convertOut(ctx context.Context, t nbdclient.Target, dest string, f Format, progress Progress) error {
	uri, err := qemuURI(t)
	if err != nil {
		return err
	}
	_, err = qemuImg(ctx, percent(100, progress), "convert", "-p", "-f", "raw", "-O", string(f), uri, fileArgument(dest))
	return err
}

func qemuURI(t nbdclient.Target) (string, error) {
	uri, err := t.URI()
	if err != nil {
		return "", &Error{fmt.Errorf("qemu-img cannot reach the server: %w", err), "run the command on the appliance itself, with a data directory of a short path, or use raw"}
	}
	return uri, nil
}

// fileArgument keeps qemu-img from reading a file name as an option, a protocol or a JSON description.
func fileArgument(path string) string {
	abs, err := filepath.Abs(path)
	if err != nil {
		abs = path
	}
	return "file:" + abs
}

// percent reads the "(12.34/100%)" that qemu-img -p prints and tells it as bytes of total.
func percent(total int64, progress Progress) func(string) {
	if progress == nil {
		return nil
	}
	return func(s string) {
		s, _, ok := strings.Cut(strings.TrimLeft(s, " \r\n("), "/")
		if p, err := strconv.ParseFloat(s, 64); ok && err == nil && p >= 0 && p <= 100 {
			progress(int64(float64(total)*p/100), total)
		}
	}
}

// qemuImg runs qemu-img and gives its standard output; line is told each line or carriage-return step of it.
func qemuImg(ctx context.Context, step func(string), args ...string) ([]byte, error) {
	path, err := exec.LookPath("qemu-img")
	if err != nil {
		return nil, &Error{errors.New("this format needs qemu-img, which is not installed"),
			"install it (Debian: apt install qemu-utils), or convert the image to raw elsewhere"}
	}
	var out, errOut clipped
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if step != nil {
		cmd.Stdout = &steps{next: &out, tell: step}
	}
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = qemuStopGrace
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		text := strings.TrimPrefix(strings.TrimSpace(errOut.String()), "qemu-img: ")
		return nil, &Error{fmt.Errorf("qemu-img %s: %w: %s", args[0], err, text), "check the image with: qemu-img check FILE"}
	}
	return out.Bytes(), nil
}

// clipped keeps the first bytes of a program's output and drops the rest.
type clipped struct{ bytes.Buffer }

func (c *clipped) Write(p []byte) (int, error) {
	if room := qemuOutputBytesMax - c.Len(); room > 0 {
		c.Buffer.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}

// steps cuts output at carriage returns and new lines.
type steps struct {
	next io.Writer
	part []byte
	tell func(string)
}

func (s *steps) Write(p []byte) (int, error) {
	for _, b := range p {
		if b == '\r' || b == '\n' {
			s.tell(string(s.part))
			s.part = s.part[:0]
		} else if len(s.part) < 256 {
			s.part = append(s.part, b)
		}
	}
	return s.next.Write(p)
}
