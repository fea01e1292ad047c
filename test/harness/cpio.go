package harness

import (
	"bytes"
	"debug/elf"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// cpio builds an initramfs in the newc format, which the kernel unpacks as its first root. Archives may follow each
// other in one initrd; later entries replace earlier ones.
type cpio struct {
	bytes.Buffer
	inode int
	have  map[string]bool
}

func newCPIO() *cpio { return &cpio{have: map[string]bool{}} }

func (c *cpio) entry(name string, mode uint32, data []byte) { c.node(name, mode, 0, 0, data) }

func (c *cpio) node(name string, mode, major, minor uint32, data []byte) {
	c.inode++
	name = strings.TrimPrefix(name, "/")
	fmt.Fprintf(c, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\x00",
		c.inode, mode, 0, 0, 1, 0, len(data), 0, 0, major, minor, len(name)+1, 0, name)
	c.Write(make([]byte, -c.Len()&3))
	c.Buffer.Write(data)
	c.Write(make([]byte, -c.Len()&3))
	c.have["/"+name] = true
}

// dir makes a directory and those above it.
func (c *cpio) dir(name string) {
	if name == "/" || name == "." || c.have[name] {
		return
	}
	c.dir(filepath.Dir(name))
	c.entry(name, 0o040755, nil)
}

func (c *cpio) file(name string, perm uint32, data []byte) {
	c.dir(filepath.Dir(name))
	c.entry(name, 0o100000|perm, data)
}

func (c *cpio) symlink(name, target string) {
	c.dir(filepath.Dir(name))
	c.entry(name, 0o120777, []byte(target))
}

// end gives the finished archive.
func (c *cpio) end() []byte {
	c.entry("TRAILER!!!", 0, nil)
	c.Write(make([]byte, -c.Len()&511))
	return c.Bytes()
}

// program copies a program of the host to /tools, a directory of its own because busybox's shell prefers its applets to
// what PATH finds, and the shared libraries that it needs.
func (c *cpio) program(name string) error {
	for _, dir := range []string{"/usr/sbin/", "/sbin/", "/usr/bin/", "/bin/"} {
		if fileExists(dir + name) {
			return c.copyELF(dir+name, "/tools/"+name)
		}
	}
	return fmt.Errorf("program %s: %w; `make setup` installs it", name, fs.ErrNotExist)
}

// copyELF stores the file from as name, and what it is linked against.
func (c *cpio) copyELF(from, name string) error {
	if c.have[name] {
		return nil
	}
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	c.file(name, 0o755, data)
	if !bytes.HasPrefix(data, []byte(elf.ELFMAG)) {
		return nil
	}
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return fmt.Errorf("%s: %w", from, err)
	}
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		text := make([]byte, p.Filesz)
		if _, err := p.ReadAt(text, 0); err != nil {
			return fmt.Errorf("%s: interpreter: %w", from, err)
		}
		interp := strings.TrimRight(string(text), "\x00")
		if err := c.copyELF(interp, interp); err != nil {
			return err
		}
	}
	libs, err := f.ImportedLibraries()
	if err != nil {
		return fmt.Errorf("%s: libraries: %w", from, err)
	}
	runpath, _ := f.DynString(elf.DT_RUNPATH)
	for _, lib := range libs {
		path, err := findLibrary(lib, runpath)
		if err != nil {
			return fmt.Errorf("%s: %w", from, err)
		}
		// All libraries go to one directory that the loader looks in by itself.
		if err := c.copyELF(path, "/lib/x86_64-linux-gnu/"+lib); err != nil {
			return err
		}
	}
	return nil
}

func findLibrary(name string, runpath []string) (string, error) {
	dirs := append(runpath, "/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/local/lib",
		"/usr/lib/x86_64-linux-gnu/ceph", "/usr/lib/x86_64-linux-gnu/pulseaudio")
	for _, d := range dirs {
		if p := filepath.Join(d, name); fileExists(p) {
			return p, nil
		}
	}
	return "", fmt.Errorf("library %s is not in %s: %w", name, strings.Join(dirs, ":"), fs.ErrNotExist)
}

func fileExists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
