package vfs

import (
	"path"
	"strings"
)

// Op names a call on FS or File. Values can be or-ed to a set.
type Op uint32

const (
	OpOpen Op = 1 << iota // OpenFile of what exists
	OpCreate
	OpMkdir
	OpRemove
	OpRename
	OpLink
	OpReadDir
	OpStat
	OpSyncDir
	OpLock
	OpSpace
	OpRead
	OpTryRead
	OpWrite
	OpSync
	OpDatasync
	OpTruncate // also OpenFile with O_TRUNC
	OpPreallocate
	OpClose
	opEnd

	// OpAny is every call.
	OpAny = opEnd - 1
	// OpMutating is every call after which a power cut or a kill can leave something else than before it.
	OpMutating = OpCreate | OpMkdir | OpRemove | OpRename | OpLink | OpSyncDir |
		OpWrite | OpSync | OpDatasync | OpTruncate | OpPreallocate
)

var opNames = [...]string{"open", "create", "mkdir", "remove", "rename", "link", "readdir", "stat", "syncdir", "lock", "space",
	"read", "tryread", "write", "sync", "datasync", "truncate", "preallocate", "close"}

func (o Op) String() string {
	var s []string
	for i, name := range opNames {
		if o&(1<<i) != 0 {
			s = append(s, name)
		}
	}
	return strings.Join(s, "|")
}

// Call describes one call on a file system. Off and Len are zero where they mean nothing.
type Call struct {
	Seq  int64 // 1 for the first call that is counted
	Op   Op
	Path string // the path it names; for Rename and Link the new name
	Off  int64
	Len  int64
}

// matchPath tells whether name matches pattern: "" matches all, "dir/**" all below dir, a pattern without a slash is compared
// with the last element, any other with the whole path, both as path.Match does.
func matchPath(pattern, name string) bool {
	if pattern == "" {
		return true
	}
	if dir, ok := strings.CutSuffix(pattern, "/**"); ok {
		return strings.HasPrefix(name, dir+"/")
	}
	if !strings.Contains(pattern, "/") {
		name = path.Base(name)
	}
	ok, err := path.Match(pattern, name)
	return ok && err == nil
}
