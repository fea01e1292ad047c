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
    title: 'Updates', lead: 'What each appliance runs, and how updates of the cluster go. One appliance after the other restarts into the new version, proves itself, or goes back.', versions: 'Versions', node: 'Node', version: 'Version', vdisks: 'Guests that wait meanwhile', state: 'State',
    same: (v: string) => `All appliances run ${v}.`, mixed: (n: number) => `${n} versions are running side by side: an update is under way, or has stopped.`, served: (n: string) => (n === '1' ? 'those of 1 vDisk' : `those of ${n} vDisks`), none: 'none', rollouts: 'Updates of the cluster', underWay: 'An update is under way', empty: 'There has been none.',
    writing: 'Writing the update', proving: 'Proving itself', notReady: 'Not ready', package: 'Updated as a package', ready: 'Ready', wentBack: (v: string) => `It went back from ${v}`,
    level: (n: number) => `Data formats: level ${n}. An appliance can go back to the version before.`, levelReady: (n: number) => `All appliances know data formats of level ${n}`, levelBody: 'Until they write them, each appliance can go back to the version before. After that there is no way back.', finalise: 'Finalise', finaliseTitle: 'Write the new data formats', finalised: 'The new data formats are written from now on',
    bundles: 'Bundle', noBundle: 'No bundle is here. It comes from whoever made this appliance, as one signed file; nothing is fetched from outside.', built: 'Built', size: 'Size', on: 'On', start: 'Start', startTitle: (v: string) => `Update all appliances to ${v}`, startVerb: 'Start the update', started: 'The update has begun', andFinalise: 'Finalise when all run it',
    startBody: 'One appliance at a time. It can be paused between two of them; one that does not prove itself goes back by itself, and the update stops there.', pause: 'Pause before the next appliance', goOn: 'Go on',
    file: 'Bundle to upload', filePlaceholder: 'varve-VERSION.varve', choose: 'Choose', upload: 'Upload', sending: 'Sending', checking: 'The appliance checks it', uploaded: (v: string) => `The bundle of ${v} is here`, notNow: 'Not while an update is under way.', broken: 'The upload was broken off: by the network, or because the appliance refuses the file',
  },
  whatIf: {
    title: 'What if a node fails', lead: 'As it is now, by what the nodes say of themselves.', node: 'Node', here: 'this one',
    quorumKept: (left: number, all: number) => `The cluster goes on: ${left} of ${all} voters are left, and decide.`, quorumLost: (left: number, all: number) => `The cluster stops deciding: ${left} of ${all} voters are left. Guests of other nodes go on; nothing can be made, deleted or changed until it is back.`,
    alone: 'It is the only node: everything stops until it is back.', extra: 'It does not vote: the cluster goes on deciding.', served: (n: string) => `${n} vDisks that it serves are away until it is back; their guests wait and go on then.`, none: 'It serves no vDisks.',
    stake: (size: string, disks: string, age: string) => `${size} of ${disks} vDisks are acknowledged and on its log disk alone, the oldest for ${age}. They are there again with the node; with its disk they would be lost.`, safe: 'Nothing that it acknowledged would be lost, not even with its disks.',
    atLeast: (s: string) => `at least ${s}`, backends: (names: string) => `vPools on its own disks: ${names}. No other node has them.`, console: 'Consoles of the other nodes go on. Hosts that mount at its address see their datastore away.',
  },
};
