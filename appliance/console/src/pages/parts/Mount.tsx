// How a host mounts a vPool, and the proof from this end that it did.
import { Alert, Button, ClipboardCopy, ClipboardCopyVariant, Content, Form, List, ListItem } from '@patternfly/react-core';
import { CheckCircleIcon, InProgressIcon } from '@patternfly/react-icons';
import { useState } from 'react';
import { useCall } from '../../api/query';
import { operate } from '../../strings/operate';
import { SelectField, TextField } from '../../ui/fields';

const s = operate.mount;

/** The exact lines that make a hypervisor use a vPool. */
export function mountCommand(target: string, server: string, pool: string, port: string): string {
  const other = port !== '2049';
  const ports = other ? `,port=${port},mountport=${port},mountproto=tcp` : '';
  switch (target) {
    case 'esxi': return `esxcli storage nfs add --host=${server} --share=/${pool} --volume-name=${pool}\nesxcli storage nfs list`;
    case 'vcenter': return `govc datastore.create -type nfs -name ${pool} -remote-host ${server} -remote-path /${pool} CLUSTER`;
    case 'powercli': return `Get-VMHost | ForEach-Object { New-Datastore -Nfs -VMHost $_ -NfsHost ${server} -Path /${pool} -Name ${pool} }`;
    case 'pve': return `pvesm add nfs ${pool} --server ${server} --export /${pool} --content images --options vers=3,hard,proto=tcp`;
    case 'libvirt': return `<pool type='netfs'>\n  <name>${pool}</name>\n  <source>\n    <host name='${server}'/>\n    <dir path='/${pool}'/>\n    <format type='nfs'/>\n    <protocol ver='3'/>\n  </source>\n  <target><path>/var/lib/libvirt/images/${pool}</path></target>\n</pool>`;
    case 'xcp': return `xe sr-create type=nfs shared=true content-type=user name-label=${pool} device-config:server=${server} device-config:serverpath=/${pool} device-config:nfsversion=3`;
    case 'qemu': return `qemu-system-x86_64 -blockdev driver=nbd,node-name=d0,server.type=inet,server.host=${server},server.port=10809,export=${pool}/DISK -device virtio-blk-pci,drive=d0`;
    case 'k8s': return `apiVersion: storage.k8s.io/v1\nkind: StorageClass\nmetadata: {name: ${pool}}\nprovisioner: nfs.csi.k8s.io\nparameters: {server: ${server}, share: /${pool}}\nmountOptions: [nfsvers=3, hard, nolock]`;
  }
  return `mount -t nfs -o vers=3,nolock,hard,proto=tcp,noatime${ports} ${server}:/${pool} /mnt/${pool}`;
}

export function Mount({ vpool }: { vpool: string }) {
  const [target, setTarget] = useState('esxi');
  const [server, setServer] = useState(location.hostname);
  const [opened] = useState(() => Date.now());
  const pool = useCall('getVPool', { path: { vpool } });
  const status = useCall('getStatus', {}, { every: 3_000 });
  const files = useCall('listEvents', { query: { topic: 'file', limit: 20 } }, { every: 3_000 });
  const nfs = status.data?.services.find((x) => x.name === 'nfs');
  const port = nfs?.address.split(':').pop() ?? '2049';
  const made = (files.data?.items ?? []).find((e) => {
    const data = (e.data ?? {}) as { vpool?: string; name?: string; path?: string };
    return new Date(e.at).getTime() >= opened && (data.vpool === undefined || data.vpool === vpool || data.vpool === pool.data?.id);
  });
  const text = mountCommand(target, server, vpool, port);
  const download = () => {
    const a = document.createElement('a');
    a.href = URL.createObjectURL(new Blob([`${text}\n`], { type: 'text/plain' }));
    a.download = `mount-${vpool}-${target}.txt`;
    a.click();
    setTimeout(() => URL.revokeObjectURL(a.href), 10_000);
  };
  return (
    <div className="varve-stack">
      <Content component="p">{s.lead}</Content>
      <Form isWidthLimited>
        <SelectField label={s.target} name="target" value={target} onChange={setTarget} options={Object.entries(s.targets)} />
        <TextField label={s.server} name="server" value={server} onChange={setServer} mono help={s.serverHelp} />
      </Form>
      <ClipboardCopy isCode isReadOnly isExpanded={text.includes('\n')} hoverTip={s.copy} clickTip={s.copied} textAriaLabel={s.targets[target]}
        variant={text.includes('\n') ? ClipboardCopyVariant.expansion : ClipboardCopyVariant.inline}>{text}</ClipboardCopy>
      <div><Button variant="link" isInline onClick={download}>{s.download}</Button></div>
      <List>{(s.notes[target] ?? []).map((n) => <ListItem key={n}>{n.replace('NAME', vpool)}</ListItem>)}
        {['esxi', 'vcenter', 'powercli'].includes(target) && <ListItem>{s.unverified}</ListItem>}
        <ListItem>{s.allowed}: {pool.data?.clients.join(', ')}</ListItem>
      </List>
      <Alert isInline variant={made ? 'success' : 'info'} title={s.proof} component="h2">
        <Content component="p">{s.proofLead}</Content>
        <div role="status">
          <p>{(nfs?.connections ?? 0) > 0 ? <CheckCircleIcon /> : <InProgressIcon />} {(nfs?.connections ?? 0) > 0 ? s.connected : s.notConnected}</p>
          <p>{made ? <CheckCircleIcon /> : <InProgressIcon />} {made ? s.written(String((made.data as { name?: string; path?: string } | undefined)?.path ?? (made.data as { name?: string } | undefined)?.name ?? made.key ?? '')) : s.notWritten}</p>
        </div>
      </Alert>
    </div>
  );
}
