package doctor

import "slices"

// Code is a check with an id that never changes, so that scripts, tickets and runbooks can name it. A code that is no longer checked stays
// here, marked.
type Code struct {
	Code  string `json:"code"`
	Title string `json:"title"`
	// By says who checks it: "doctor" (the command, on one machine), "health" (every node all the time) or both.
	By string `json:"by"`
	// Remedy is what helps in general; a finding has a more exact one.
	Remedy string `json:"remedy"`
}

// codes in alphabetical order.
var codes = []Code{
	{"backend.answers", "backends answer", "health", "check the store: its server, credentials, clock, certificate, room"},
	{"backend.local", "local backend keeps its contract", "doctor", "use a POSIX file system on a local disk"},
	{"backend.room", "room on the backends", "health", "delete what is not needed, shorten retention, or give the backend more room"},
	{"backend.vpool", "what the probe of a vPool found", "doctor", "move the vPool's vDisks to a store that honours If-None-Match"},
	{"certificate.node", "certificate of the node port", "health", "see that a master with the authority's key can be reached: varve cluster status"},
	{"cluster.hash", "the state of all nodes is the same", "health", "move the control directory of the node that stopped away and join again"},
	{"cluster.leader", "the control cluster has a leader", "health", "bring a majority of the masters back"},
	{"cluster.masters", "enough masters for the loss of one", "health", "join appliances as masters: three survive the loss of one"},
	{"cluster.versions", "all nodes run one version", "health", "finish the update"},
	{"config.drift", "the node runs with the cluster's configuration", "health", "restart the node; see varve config list, and its own flags, environment and config.json"},
	{"disk.data", "room on the disk of the data directory", "both", "free room on it, or give the log and the cache less"},
	{"disk.flush", "fdatasync reaches a device", "doctor", "use a disk that keeps what it has acknowledged"},
	{"disk.log", "speed of the log disk", "doctor", "use an SSD with protection against power loss"},
	{"disk.mount", "data directory is on a real disk", "doctor", "mount a disk there"},
	{"disk.space", "room left for data", "doctor", "free room, or use a larger disk"},
	{"events.sinks", "events reach where they are sent", "health", "check the receiver and the secret: varve sink list"},
	{"host.clock", "clock is kept by NTP", "both", "run chrony"},
	{"host.files", "limit of open files", "both", "LimitNOFILE=1048576 in the unit"},
	{"host.memory", "memory for maps and buffers", "both", "give the appliance more memory"},
	{"layout.disk", "disks of log, cache and backends", "doctor", "put the log on an SSD, apart from rotating disks"},
	{"layout.memory", "memory for the budgets that are set", "doctor", "give the appliance more memory: see Sizing in the README"},
	{"layout.self", "the appliance does not lie on what it serves", "doctor", "put --data and the backends on disks of this machine"},
	{"log.failed", "the write log takes writes", "health", "restart the appliance, on a sound disk"},
	{"log.room", "room in the write log", "health", "check that the backends answer and are fast enough, or give the log more room"},
	{"model.reality", "volumes of the state are those of the engine", "health", "look at the events and run varve doctor"},
	{"node.crashed", "no process of the node has crashed lately", "health", "make a support bundle: it holds the report; varve crashes"},
	{"node.reachable", "nodes answer each other", "health", "open port 7443 between the nodes"},
	{"node.ready", "exports are open", "health", "look at the node's log"},
	{"secrets.keys", "sealed secrets can be opened", "health", "put secrets.key back, or set the secrets again"},
	{"server.nbd", "every NBD export opens and reads", "doctor", "see the log for the vDisk"},
	{"server.nfs", "every NFS export mounts and reads", "doctor", "check the vPool's list of clients"},
	{"server.state", "appliance is up and sound", "doctor", "see the log"},
	{"schedules.due", "schedules run when they are due", "health", "varve schedule list; varve task list"},
	{"tasks.failed", "tasks of the last day succeeded", "health", "varve task show ID; mend what it names, then varve task retry ID"},
	{"tasks.waiting", "tasks do not wait for long", "health", "see that the node of their queue runs"},
	{"volumes.halted", "volumes are served", "health", "see the log for the volume; varve vdisk explain"},
	{"volumes.lost", "volumes have their log and map", "health", "stop the appliance and run varve rebuild"},
}

// Codes lists every code.
func Codes() []Code { return slices.Clone(codes) }

// CodeOf finds one.
func CodeOf(code string) (Code, bool) {
	i := slices.IndexFunc(codes, func(c Code) bool { return c.Code == code })
	if i < 0 {
		return Code{}, false
	}
	return codes[i], true
}
