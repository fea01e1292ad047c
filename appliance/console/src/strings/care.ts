// Certificates, support bundle, updates, and what the loss of a node would mean.
export const care = {
  certificates: {
    title: 'Certificates', lead: 'Nodes know each other by certificates of the cluster\'s own authority. A schedule renews them long before they end.', node: 'Node', ends: 'Ends', state: 'State', ok: 'Valid', soon: 'Ends soon', over: 'Has ended', unknown: 'No word from it', untold: 'Not known: it has no port for other nodes',
    renew: 'Renew what ends soon', renewing: 'A task looks at every node; watch it in the task drawer', renewal: 'Renewal', last: 'Last looked', next: 'Next', off: 'The schedule is switched off: nothing is renewed by itself.', name: 'Schedule', of: 'Certificates of the nodes',
    browser: 'The certificate that your browser sees', browserBody: 'It is signed by the same authority. To have the browser trust it, import the authority\'s certificate: DATA/tls/ca.crt on any appliance.',
  },
  support: {
    title: 'Support bundle', lead: 'What somebody who helps needs to see, and nothing else: only fields on a list, no secrets, no passwords, no data of vDisks, no addresses of backends. It is put together in this browser; nothing is sent anywhere.',
    choose: 'What it is to hold', collect: 'Collect', again: 'Collect again', download: 'Download', read: 'Read it before you give it to anybody', items: (n: number) => `${n} ${n === 1 ? 'entry' : 'entries'}`, missing: 'Not there', none: 'Choose at least one part.', section: 'Part', size: 'Size', holds: 'Holds',
    crash: 'Reports of crashed processes are on the appliance itself: varve support bundle FILE there takes them along.', show: 'Read', working: (n: number, all: number) => `${n} of ${all}`,
  },
  updates: {
    title: 'Updates', lead: 'What each appliance runs, and how updates of the cluster went. One appliance after the other restarts into the new version, proves itself, or goes back.', versions: 'Versions', node: 'Node', version: 'Version', vdisks: 'Guests that wait meanwhile',
    same: (v: string) => `All appliances run ${v}.`, mixed: (n: number) => `${n} versions are running side by side: an update is under way, or has stopped.`, served: (n: string) => `those of ${n} vDisks`, none: 'none', rollouts: 'Updates of the cluster', empty: 'There has been none.',
    start: 'Start an update', startBody: 'The bundle is a large file: it is given to an appliance there, by its command line. What happens then is shown here. Nothing is fetched from outside.', command: 'varve update rollout varve.bundle', verify: 'varve update verify varve.bundle', stop: 'Cancelling stops between two appliances.',
  },
  whatIf: {
    title: 'What if a node fails', lead: 'As it is now, by what the nodes say of themselves.', node: 'Node', here: 'this one',
    quorumKept: (left: number, all: number) => `The cluster goes on: ${left} of ${all} voters are left, and decide.`, quorumLost: (left: number, all: number) => `The cluster stops deciding: ${left} of ${all} voters are left. Guests of other nodes go on; nothing can be made, deleted or changed until it is back.`,
    alone: 'It is the only node: everything stops until it is back.', extra: 'It does not vote: the cluster goes on deciding.', served: (n: string) => `${n} vDisks that it serves are away until it is back; their guests wait and go on then.`, none: 'It serves no vDisks.',
    stake: (size: string, disks: string, age: string) => `${size} of ${disks} vDisks are acknowledged and on its log disk alone, the oldest for ${age}. They are there again with the node; with its disk they would be lost.`, safe: 'Nothing that it acknowledged would be lost, not even with its disks.',
    atLeast: (s: string) => `at least ${s}`, backends: (names: string) => `vPools on its own disks: ${names}. No other node has them.`, console: 'Consoles of the other nodes go on. Hosts that mount at its address see their datastore away.',
  },
};
