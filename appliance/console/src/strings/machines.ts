// vMachines and hypervisors.
export const machines = {
  vmachines: {
    title: 'vMachines', lead: 'Virtual machines whose disks lie on vPools, as their hypervisors describe them. A snapshot of one is of all its disks at one point in time.',
    empty: 'No vMachines yet', emptyBody: 'They appear by themselves: the appliance reads the .vmx and libvirt files on its vPools, and asks the hypervisors that it knows.', toHypervisors: 'Add a hypervisor',
    name: 'Name', power: 'Power', disks: 'Disks', host: 'Host', hypervisor: 'Hypervisor', guest: 'Guest', cpus: 'vCPUs', memory: 'Memory', config: 'Described by', format: 'Format', uuid: 'Id at the hypervisor', clients: 'Clients', template: 'Template',
    overview: 'Overview', snapshots: 'Snapshots', events: 'Events', label: 'Disk', file: 'File', vdisk: 'vDisk', nowhere: 'on no vPool', unknown: 'unknown',
    layered: 'Its hypervisor runs it on snapshots of its own', layeredBody: 'What is rolled back or cloned here are the files below those. Consolidate the hypervisor\'s snapshots first.', problem: 'The file that describes it cannot be read',
    snapshot: 'Take snapshot', clone: 'Clone', rollback: 'Roll back', remove: 'Delete', makeTemplate: 'Make template', makeVM: 'Make an ordinary vMachine', purge: 'Its disks for good now, not into the trash', force: 'Also while it runs',
    deleteTitle: (n: string) => `Delete ${n}`, deleted: 'A task deletes it; watch it in the task drawer', cloneTitle: (n: string) => `Make vMachines of ${n}`, names: 'Names of the new vMachines', namesHelp: 'One a line. Each gets a directory of its name, to be registered at a hypervisor.',
    from: 'From', now: 'what it is now (a snapshot is taken)', cloneStarted: 'A task makes them; watch it in the task drawer', templateTitle: (n: string) => `Make ${n} a template`, templateBody: 'Its disks take no writes then. vMachines are made from it without copying.',
    templateDone: (n: string) => `${n} is a template`, templateUndone: (n: string) => `${n} is an ordinary vMachine`,
  },
  snapshots: {
    name: 'Name', nameHelp: 'Empty: the time of now.', created: 'Time', kind: 'Kind', automatic: 'By policy', manual: 'By hand', complete: 'Disks', of: (n: number, all: number) => `${n} of ${all}`, backed: 'On backend', kept: 'Kept', clones: 'Clones', consistent: 'Consistent',
    consistentHelp: 'The guest is shut down or its file systems are frozen: a mark for you, the appliance does not check.', keep: 'Keep: retention leaves it alone', partial: 'Also if some disks are on no vPool', take: 'Take snapshot', taken: (n: string) => `Snapshot ${n} is taken`,
    empty: 'No snapshots yet', emptyBody: 'A snapshot holds all disks of the vMachine at one point in time.', rollback: 'Roll back to it', rollbackTitle: (vm: string, s: string) => `Roll ${vm} back to ${s}`, rollbackStarted: 'A task rolls it back; watch it in the task drawer', remove: 'Delete',
    deleteTitle: (n: string) => `Delete snapshot ${n}`, deleted: (n: string) => `Snapshot ${n} is deleted`, force: 'Also if it is kept', yes: 'Yes', no: 'No', forceRunning: 'Also while clients have its disks open',
  },
  hypervisors: {
    title: 'Hypervisors', lead: 'vCenters, ESXi hosts and libvirt daemons that the appliance may ask which VMs they have, and have mount vPools.', add: 'Add hypervisor', addTitle: 'Add a hypervisor', empty: 'No hypervisors yet',
    emptyBody: 'Hosts may mount vPools without it. With it the appliance mounts them for you, shows what each host sees, and knows which VM runs where.', name: 'Name', kind: 'Kind', kinds: [['vsphere', 'vSphere: vCenter or ESXi'], ['libvirt', 'libvirt']] as [string, string][],
    kindName: { vsphere: 'vSphere', libvirt: 'libvirt' } as Record<string, string>, address: 'Address', addressHelp: { vsphere: 'https://vcenter.example.com', libvirt: 'qemu+tls://host/system' } as Record<string, string>, user: 'User', password: 'Password', passwordHelp: 'Kept sealed by the appliance, never shown again.',
    thumbprint: 'Thumbprint of its certificate', thumbprintHelp: 'Only if its certificate is not signed by a known authority: the refusal names it. Compare it with what the host shows.', ca: 'Certificate authority (PEM)', certificate: 'Client certificate (PEM)', key: 'Key of the client certificate (PEM)',
    insecure: 'Take qemu+tcp, which neither encrypts nor asks who calls', state: 'State', hosts: 'Hosts', mounts: 'Mounts', vms: 'vMachines', checked: 'Asked', version: 'Version', since: 'Since', added: (n: string) => `${n} is added`, saved: 'Saved',
    test: 'Ask now', tested: (n: string) => `${n} answers`, edit: 'Change how it is reached', editTitle: (n: string) => `How ${n} is reached`, keepHelp: 'Empty: as it is.', remove: 'Forget', removeTitle: (n: string) => `Forget ${n}`, removed: (n: string) => `${n} is forgotten`,
    failing: 'It cannot be asked', mount: 'Mount a vPool', mountTitle: (n: string) => `Have hosts of ${n} mount a vPool`, vpool: 'vPool', allHosts: 'All hosts', datastore: 'Name of the datastore', datastoreHelp: 'Empty: the name of the vPool.', server: 'Address of the appliance', serverHelp: 'As the hosts reach it. Empty: that of this node.',
    which: 'Which hosts', mounted: (n: number) => (n === 1 ? 'one host has it' : `${n} hosts have it`), failed: (h: string) => `${h} has not mounted it`, unmount: 'Unmount', unmountTitle: (p: string, n: string) => `Have the hosts of ${n} unmount ${p}`, unmounted: (p: string) => `${p} is unmounted`, host: 'Host',
    usable: 'Usable', unusable: 'not usable', readOnly: 'read-only', path: 'Path', export: 'Mounted from', noMounts: 'None of its hosts has mounted a vPool.', noHosts: 'It told of no hosts yet.',
  },
};
