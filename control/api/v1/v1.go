// Package v1 is the JSON of the customer API, /api/customer/v1. Fields are only ever added. Sizes are bytes; a size that a
// client sends may also be a string with a unit ("10GiB"). Times are RFC 3339 in UTC.
//
//	GET    /vpools                         []VPool            POST /vpools             VPoolCreate -> 201 VPool
//	GET    /vpools/{name}                  VPool              PATCH /vpools/{name}     VPoolPatch -> VPool
//	DELETE /vpools/{name}                  204
//	GET    /vdisks[?vpool=name]            []VDisk            POST /vdisks             VDiskCreate -> 201 VDisk
//	GET    /vdisks/{vpool}/{path…}         VDisk              PATCH …                  VDiskPatch -> VDisk
//	DELETE /vdisks/{vpool}/{path…}[?force=true]  204
//	GET    /nodes                          []Node             GET /nodes/{name}        Node
//	GET    /status                         Status
//	GET    /explain/{vpool}/{path…}?lba=N|offset=BYTES        Explanation
//	POST   /rebuild                        RebuildRequest -> RebuildReport
//	errors                                 Problem (application/problem+json)
package v1

import (
	"encoding/json"
	"time"

	"github.com/google/uuid"

	"varve/control/bytesize"
)

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

// Problem is an error as RFC 9457 has it. Code is stable: usage, invalid, not_found, exists, not_empty, conflict, unauthenticated,
// forbidden, unavailable, no_space, too_large, method, internal.
type Problem struct {
	Type      string   `json:"type"`
	Title     string   `json:"title"`
	Status    int      `json:"status"`
	Detail    string   `json:"detail,omitempty"`
	Code      string   `json:"code"`
	Object    string   `json:"object,omitempty"`
	By        []string `json:"by,omitempty"`
	Remedy    string   `json:"remedy,omitempty"`
	RequestID string   `json:"request_id,omitempty"`
	// Rev is the object's present rev where a stale one was given.
	Rev uint64 `json:"rev,omitempty"`
}

// Error makes a Problem an error of the client.
func (p *Problem) Error() string {
	if p.Detail != "" {
		return p.Detail
	}
	return p.Title
}

// VPool is a storage pool exported as one datastore.
type VPool struct {
	Name    string    `json:"name"`
	ID      uuid.UUID `json:"id"`
	Backend string    `json:"backend"`
	// Clients are the networks that may mount over NFS.
	Clients []string `json:"clients"`
	Class   string   `json:"class"`
	VDisks  int      `json:"vdisks"`
	Files   int      `json:"files"`
	// Deleting counts deleted files that still take space.
	Deleting int  `json:"deleting"`
	Total    Size `json:"total"`
	Free     Size `json:"free"`
	Stored   Size `json:"stored"`
	// Findings of the backend's probe; only in the answer to a create.
	Findings map[string]string `json:"findings,omitempty"`
	Created  time.Time         `json:"created"`
	Rev      uint64            `json:"rev"`
}

// VPoolCreate makes a vPool. Clients left out stands for this host and the private networks, [] for nobody.
type VPoolCreate struct {
	Name    string   `json:"name"`
	Backend string   `json:"backend"`
	Clients []string `json:"clients,omitempty"`
}

// VPoolPatch changes who may mount. Rev, unless 0, must be the present one.
type VPoolPatch struct {
	Clients []string `json:"clients"`
	Rev     uint64   `json:"rev,omitempty"`
}

// VDisk is a virtual disk.
type VDisk struct {
	// Name is "vpool/path" without the suffix; it is also the NBD export's.
	Name    string    `json:"name"`
	VPool   string    `json:"vpool"`
	ID      uuid.UUID `json:"id"` // of the volume
	File    string    `json:"file"`
	Size    Size      `json:"size"`
	Used    Size      `json:"used"`
	State   string    `json:"state"`
	Class   string    `json:"class"`
	Owner   string    `json:"owner,omitempty"`
	Epoch   uint64    `json:"epoch"`
	Open    bool      `json:"open"`
	Clients int       `json:"clients"`
	// Pending bytes are not on the backend yet.
	Pending  Size      `json:"pending"`
	Created  time.Time `json:"created"`
	Modified time.Time `json:"modified"`
	Rev      uint64    `json:"rev"`
}

// VDiskCreate makes a sparse vDisk.
type VDiskCreate struct {
	Name string `json:"name"`
	Size Size   `json:"size"`
}

// VDiskPatch resizes or renames, one at a time. A smaller size needs Shrink.
type VDiskPatch struct {
	Name   string `json:"name,omitempty"`
	Size   *Size  `json:"size,omitempty"`
	Shrink bool   `json:"shrink,omitempty"`
}

// Node is an appliance of the cluster.
type Node struct {
	Name    string    `json:"name"`
	ID      uuid.UUID `json:"id"`
	Role    string    `json:"role"`
	NBD     string    `json:"nbd,omitempty"`
	NFS     string    `json:"nfs,omitempty"`
	HTTPS   string    `json:"https,omitempty"`
	Version string    `json:"version"`
	Self    bool      `json:"self"`
	Joined  time.Time `json:"joined"`
	Seen    time.Time `json:"seen"`
}

// Status is the state of the appliance that answers.
type Status struct {
	// State is "ok" or "degraded"; Problems says why.
	State    string    `json:"state"`
	Problems []string  `json:"problems"`
	Node     string    `json:"node"`
	NodeID   uuid.UUID `json:"node_id"`
	Cluster  uuid.UUID `json:"cluster"`
	Version  string    `json:"version"`
	Started  time.Time `json:"started"`
	Ready    bool      `json:"ready"`
	VPools   int       `json:"vpools"`
	VDisks   int       `json:"vdisks"`
	Files    int       `json:"files"`
	Deleting int       `json:"deleting"`
	Services []Service `json:"services"`
	Log      LogStatus `json:"log"`
	Index    uint64    `json:"index"`
}

// Service is a protocol that the appliance serves.
type Service struct {
	Name        string `json:"name"`
	Address     string `json:"address"`
	Connections int    `json:"connections"`
}

// LogStatus is how full the write log is.
type LogStatus struct {
	Capacity Size `json:"capacity"`
	Used     Size `json:"used"`
	Pending  Size `json:"pending"`
}

// Explanation says where the block at an address is. State is "log", "object" or "hole".
type Explanation struct {
	VDisk  string `json:"vdisk"`
	LBA    uint64 `json:"lba"`
	Offset Size   `json:"offset"`
	State  string `json:"state"`
	Seq    uint64 `json:"seq,omitempty"`
	Object string `json:"object,omitempty"`
	Index  int    `json:"index,omitempty"`
	CRC    string `json:"crc,omitempty"` // crc32c, 8 hex digits
	Detail string `json:"detail,omitempty"`
}

// RebuildRequest opens a vPool again from its backend alone. Name is the one it gets here.
type RebuildRequest struct {
	Name    string `json:"name"`
	Backend string `json:"backend,omitempty"`
}

// RebuildReport says at which prefix of its writes every volume stands.
type RebuildReport struct {
	VPool   string          `json:"vpool"`
	Volumes []RebuiltVolume `json:"volumes"`
}

// RebuiltVolume is one volume found on a backend.
type RebuiltVolume struct {
	ID   uuid.UUID `json:"id"`
	Path string    `json:"path"`
	Size Size      `json:"size"`
	// Seq is the last write that the volume holds, Written when it was logged.
	Seq     uint64     `json:"seq"`
	Written *time.Time `json:"written,omitempty"`
	Objects int        `json:"objects"`
	// Lost counts objects that are missing or damaged; Detail says what that means.
	Lost   int    `json:"lost"`
	Detail string `json:"detail,omitempty"`
}
