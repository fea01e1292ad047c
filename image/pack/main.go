// Command pack makes of the raw disk what people import: the list of its parts, the VMDK and the OVA around it, and reads the OVA
// back by every importer's rules before it is left for anyone to download.
package main

import (
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"varve/image/ova"
	"varve/image/sbom"
	"varve/image/vmdk"
)

type task struct {
	name, version, raw, out string
	dpkg, boot, binary, npm string
	epoch                   int64
	cpus, memoryMB, dataGB  int
}

func main() {
	var t task
	flag.StringVar(&t.name, "name", "varve", "base `NAME` of the files")
	flag.StringVar(&t.version, "version", "", "the appliance's version")
	flag.StringVar(&t.raw, "raw", "", "the system disk's `FILE`")
	flag.StringVar(&t.out, "out", ".", "`DIR` for what is made")
	flag.StringVar(&t.dpkg, "dpkg", "", "dpkg's status `FILE` of the image")
	flag.StringVar(&t.boot, "boot", "", "`FILE` of the boot loader's packages, in the same form")
	flag.StringVar(&t.binary, "binary", "", "the varve binary's `FILE`")
	flag.StringVar(&t.npm, "npm", "", "the console's package-lock.json; none if it does not exist")
	flag.Int64Var(&t.epoch, "epoch", 0, "the time of everything, in seconds since 1970")
	flag.IntVar(&t.cpus, "cpus", 4, "virtual CPUs")
	flag.IntVar(&t.memoryMB, "memory", 8192, "memory in MB")
	flag.IntVar(&t.dataGB, "data", 64, "the data disk's size in GiB, where the importer makes one")
	flag.Parse()
	if err := t.run(); err != nil {
		fmt.Fprintln(os.Stderr, "pack:", err)
		os.Exit(1)
	}
}

func (t task) run() error {
	if err := t.list(); err != nil {
		return err
	}
	disk, err := os.Open(t.raw)
	if err != nil {
		return err
	}
	defer disk.Close()
	info, err := disk.Stat()
	if err != nil {
		return err
	}
	// The disk's id must differ when its contents do, and be the same when they are.
	digest := sha256.New()
	if _, err := io.Copy(digest, disk); err != nil {
		return fmt.Errorf("read %s: %w", t.raw, err)
	}
	vmdkFile := filepath.Join(t.out, t.name+".vmdk")
	o := vmdk.Options{ID: [16]byte(digest.Sum(nil)), Name: filepath.Base(vmdkFile)}
	var length int64
	if err := create(vmdkFile, func(f io.Writer) (err error) {
		length, err = vmdk.Write(f, disk, info.Size(), o)
		return err
	}); err != nil {
		return err
	}
	packed, err := os.Open(vmdkFile)
	if err != nil {
		return err
	}
	defer packed.Close()
	a := ova.Appliance{Name: "varve", Version: t.version, Vendor: "Varve", URL: "https://varve.invalid/", CPUs: t.cpus, MemoryMB: t.memoryMB,
		SystemDisk: filepath.Base(vmdkFile), SystemBytes: info.Size(), SystemFile: length, DataGB: t.dataGB, Properties: ova.Properties()}
	ovaFile := filepath.Join(t.out, t.name+".ova")
	if err := create(ovaFile, func(f io.Writer) error { return ova.Write(f, a, t.name, packed, time.Unix(t.epoch, 0)) }); err != nil {
		return err
	}
	return errors.Join(lint(ovaFile), os.Remove(vmdkFile))
}

// list writes the SBOM.
func (t task) list() error {
	var all []sbom.Package
	for _, file := range []string{t.dpkg, t.boot} {
		f, err := os.Open(file)
		if err != nil {
			return err
		}
		p, err := sbom.Debian(f)
		f.Close()
		if err != nil {
			return fmt.Errorf("read %s: %w", file, err)
		}
		all = append(all, p...)
	}
	binary, err := os.Open(t.binary)
	if err != nil {
		return err
	}
	defer binary.Close()
	modules, err := sbom.Go(binary)
	if err != nil {
		return fmt.Errorf("%s: %w", t.binary, err)
	}
	all = append(all, modules...)
	lock, err := os.ReadFile(t.npm)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err == nil {
		npm, err := sbom.NPM(lock)
		if err != nil {
			return err
		}
		all = append(all, npm...)
	}
	return create(filepath.Join(t.out, t.name+".spdx.json"), func(f io.Writer) error {
		return sbom.Write(f, "varve", t.version, time.Unix(t.epoch, 0), all)
	})
}

// create writes a file that is there whole or not at all.
func create(name string, write func(io.Writer) error) error {
	f, err := os.Create(name + ".new")
	if err != nil {
		return err
	}
	if err := errors.Join(write(f), f.Close()); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return os.Rename(f.Name(), name)
}

func lint(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	found, err := ova.Lint(f, info.Size())
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if len(found) > 0 {
		return fmt.Errorf("%s: %s", name, strings.Join(found, "; "))
	}
	return nil
}
