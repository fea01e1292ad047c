// The hypervisors that the appliance may ask, and what their hosts have mounted.
import { Alert, Button, Card, CardBody, CardTitle } from '@patternfly/react-core';
import { ServerIcon } from '@patternfly/react-icons';
import { Table, Tbody, Td, Th, Thead, Tr } from '@patternfly/react-table';
import { useState } from 'react';
import { Link, useNavigate, useParams } from 'react-router';
import { call } from '../api/call';
import type { Answer, ItemOf } from '../api/call';
import { useCall, useRefresh } from '../api/query';
import { useMay } from '../api/session';
import { machines } from '../strings/machines';
import { storage } from '../strings/storage';
import { t } from '../strings';
import { Destroy, FormDialog } from '../ui/dialog';
import { CheckField, ChoicesField, SelectField, TextAreaField, TextField } from '../ui/fields';
import { Facts } from '../ui/Facts';
import { hypervisorPath, vpoolPath } from '../ui/names';
import { ObjectTable } from '../ui/ObjectTable';
import { Loaded, Page } from '../ui/Page';
import { State, When } from '../ui/State';
import { useToast } from '../ui/toast';

const s = machines.hypervisors;
type PMachine = ItemOf<'listPMachines'>;

const read = ['listPMachines', 'getPMachine', 'listVMachines'] as const;

export default function Hypervisors() {
  const { pmachine } = useParams();
  return pmachine === undefined ? <All /> : <One name={pmachine} />;
}

function All() {
  const may = useMay();
  const [adding, setAdding] = useState(false);
  const [removing, setRemoving] = useState<PMachine>();
  const add = may('createPMachine') && <Button onClick={() => setAdding(true)}>{s.add}</Button>;
  return (
    <Page title={s.title} lead={s.lead} actions={add} operations={['listPMachines', 'createPMachine', 'deletePMachine']}>
      <ObjectTable id="hypervisors" label={s.title} op="listPMachines" rowKey={(x: PMachine) => x.id} sort="name" every={30_000}
        columns={[
          { key: 'name', title: s.name, cell: (x) => <Link to={hypervisorPath(x.name)}>{x.name}</Link> },
          { key: 'state', title: s.state, cell: (x) => <State value={x.state} /> },
          { key: 'kind', title: s.kind, cell: (x) => s.kindName[x.kind] ?? x.kind },
          { key: 'address', title: s.address, cell: (x) => <span className="varve-mono">{x.address}</span> },
          { key: 'hosts', title: s.hosts, right: true, sortable: false, cell: (x) => x.hosts.length, csv: (x) => x.hosts.length },
          { key: 'vmachines', title: s.vms, right: true, cell: (x) => x.vmachines },
          { key: 'checked', title: s.checked, cell: (x) => <When at={x.checked} /> },
          { key: 'version', title: s.version, hidden: true, cell: (x) => x.version ?? '' },
        ]}
        actions={() => [{ title: s.remove, danger: true, disabled: !may('deletePMachine'), onClick: setRemoving }]}
        empty={{ title: s.empty, body: s.emptyBody, icon: ServerIcon, action: add }} />
      {adding && <Add onClose={() => setAdding(false)} />}
      {removing && <Forget pmachine={removing} onClose={() => setRemoving(undefined)} onDone={() => undefined} />}
    </Page>
  );
}

/** How a hypervisor is reached: what is left empty of one that is there stays as it is. */
function useReach(kind: string, before?: PMachine) {
  const [address, setAddress] = useState(before?.address ?? '');
  const [user, setUser] = useState(before?.user ?? '');
  const [password, setPassword] = useState('');
  const [thumbprint, setThumbprint] = useState(before?.thumbprint ?? '');
  const [ca, setCA] = useState('');
  const [certificate, setCertificate] = useState('');
  const [key, setKey] = useState('');
  const [insecure, setInsecure] = useState(false);
  const keep = before ? s.keepHelp : undefined;
  const given = Object.entries({ user, password, thumbprint, ca, certificate, key }).filter(([, v]) => v !== '');
  return {
    address,
    body: { address, ...Object.fromEntries(given), ...(insecure ? { insecure } : {}) },
    fields: (
      <>
        <TextField label={s.address} name="address" value={address} onChange={setAddress} required mono help={s.addressHelp[kind]} />
        <TextField label={s.user} name="user" value={user} onChange={setUser} />
        <TextField label={s.password} name="password" type="password" value={password} onChange={setPassword} autoComplete="new-password" help={keep ?? s.passwordHelp} />
        {kind === 'vsphere' && <TextField label={s.thumbprint} name="thumbprint" value={thumbprint} onChange={setThumbprint} mono help={s.thumbprintHelp} />}
        {kind === 'libvirt' && (
          <>
            <TextAreaField label={s.ca} name="ca" value={ca} onChange={setCA} mono rows={3} help={keep} />
            <TextAreaField label={s.certificate} name="certificate" value={certificate} onChange={setCertificate} mono rows={3} help={keep} />
            <TextAreaField label={s.key} name="key" value={key} onChange={setKey} mono rows={3} help={keep ?? s.passwordHelp} />
            <CheckField label={s.insecure} name="insecure" value={insecure} onChange={setInsecure} />
          </>
        )}
      </>
    ),
  };
}

function Add({ onClose }: { onClose: () => void }) {
  const [name, setName] = useState('');
  const [kind, setKind] = useState('vsphere');
  const reach = useReach(kind);
  const toast = useToast();
  const refresh = useRefresh();
  const go = useNavigate();
  return (
    <FormDialog title={s.addTitle} submit={s.add} onClose={onClose} disabled={!name || !reach.address} onSubmit={async () => {
      const made = await call('createPMachine', { body: { name, kind, ...reach.body } });
      await refresh(...read);
      toast.done(s.added(made.name));
      void go(hypervisorPath(made.name));
    }}>
      <TextField label={s.name} name="name" value={name} onChange={setName} required autoFocus />
      <SelectField label={s.kind} name="kind" value={kind} onChange={setKind} options={s.kinds} />
      {reach.fields}
    </FormDialog>
  );
}

function Forget({ pmachine, onClose, onDone }: { pmachine: PMachine; onClose: () => void; onDone: () => void }) {
  const toast = useToast();
  const refresh = useRefresh();
  return (
    <Destroy title={s.removeTitle(pmachine.name)} verb={s.remove} op="deletePMachine" args={{ path: { pmachine: pmachine.name }, rev: 0 }} onClose={onClose} onDone={() => {
      void refresh(...read);
      toast.done(s.removed(pmachine.name));
      onDone();
    }} />
  );
}

type Dialog = '' | 'mount' | 'edit' | 'remove';

function One({ name }: { name: string }) {
  const query = useCall('getPMachine', { path: { pmachine: name } }, { every: 15_000 });
  const may = useMay();
  const toast = useToast();
  const go = useNavigate();
  const [dialog, setDialog] = useState<Dialog>('');
  const [unmounting, setUnmounting] = useState('');
  const [busy, setBusy] = useState(false);
  const refresh = useRefresh();
  const close = () => setDialog('');
  const p = query.data;
  const test = () => {
    setBusy(true);
    call('testPMachine', { path: { pmachine: name } })
      .then(() => toast.done(s.tested(name)), (e: unknown) => toast.failed(e)).finally(() => { setBusy(false); void refresh(...read); });
  };
  return (
    <Page title={name} trail={[[s.title, '/hypervisors']]} label={p && <State value={p.state} />} names={{ pmachine: name }}
      operations={['getPMachine', 'testPMachine', 'patchPMachine', 'deletePMachine', 'mountOnPMachine', 'unmountFromPMachine']}
      actions={p && (
        <>
          {may('mountOnPMachine') && <Button onClick={() => setDialog('mount')}>{s.mount}</Button>}
          {may('testPMachine') && <Button variant="secondary" onClick={test} isLoading={busy} isDisabled={busy}>{s.test}</Button>}
          {may('patchPMachine') && <Button variant="secondary" onClick={() => setDialog('edit')}>{s.edit}</Button>}
          {may('deletePMachine') && <Button variant="link" isDanger onClick={() => setDialog('remove')}>{s.remove}</Button>}
        </>
      )}>
      <Loaded query={query}>
        {(x) => (
          <div className="varve-stack">
            {x.error && <Alert isInline variant="danger" component="h2" title={s.failing}>{x.error}</Alert>}
            <Card><CardBody>
              <Facts items={[
                [s.kind, s.kindName[x.kind] ?? x.kind], [s.address, <span className="varve-mono">{x.address}</span>], [s.user, x.user || storage.none], [s.version, x.version || storage.none],
                [s.vms, <Link to="/vmachines">{x.vmachines}</Link>], [s.checked, <When at={x.checked} />], [s.since, <When at={x.since} />],
                [s.thumbprint, <span className="varve-mono">{x.thumbprint || storage.none}</span>],
              ]} />
            </CardBody></Card>
            <Hosts pmachine={x} onUnmount={may('unmountFromPMachine') ? setUnmounting : undefined} />
          </div>
        )}
      </Loaded>
      {p && dialog === 'mount' && <MountOn pmachine={p} onClose={close} />}
      {p && dialog === 'edit' && <Edit pmachine={p} onClose={close} />}
      {p && dialog === 'remove' && <Forget pmachine={p} onClose={close} onDone={() => void go('/hypervisors')} />}
      {p && unmounting !== '' && (
        <Destroy title={s.unmountTitle(unmounting, name)} verb={s.unmount} op="unmountFromPMachine" args={{ path: { pmachine: name, vpool: unmounting } }} onClose={() => setUnmounting('')}
          onDone={() => {
            void refresh(...read);
            toast.done(s.unmounted(unmounting));
          }} />
      )}
    </Page>
  );
}

function Hosts({ pmachine, onUnmount }: { pmachine: Answer<'getPMachine'>; onUnmount: ((vpool: string) => void) | undefined }) {
  const pools = [...new Set(pmachine.mounts.map((m) => m.vpool))].sort();
  return (
    <>
      <Card><CardTitle component="h2">{s.hosts}</CardTitle><CardBody>
        {pmachine.hosts.length === 0 ? <p className="varve-dim">{s.noHosts}</p> : (
          <Table aria-label={s.hosts} variant="compact">
            <Thead><Tr><Th>{s.host}</Th><Th>{s.state}</Th><Th>{s.address}</Th><Th>{s.version}</Th><Th>{s.mounts}</Th></Tr></Thead>
            <Tbody>
              {pmachine.hosts.map((h) => (
                <Tr key={h.name}>
                  <Td dataLabel={s.host}>{h.name}</Td><Td dataLabel={s.state}><State value={h.state} /></Td><Td dataLabel={s.address}>{h.address ?? ''}</Td><Td dataLabel={s.version}>{h.version ?? ''}</Td><Td dataLabel={s.mounts}>{h.mounted}</Td>
                </Tr>
              ))}
            </Tbody>
          </Table>
        )}
      </CardBody></Card>
      <Card><CardTitle component="h2">{s.mounts}</CardTitle><CardBody className="varve-stack">
        {pools.length === 0 && <p className="varve-dim">{s.noMounts}</p>}
        {pools.map((pool) => {
          const on = pmachine.mounts.filter((m) => m.vpool === pool);
          return (
            <div key={pool}>
              <p><Link to={vpoolPath(pool)}>{pool}</Link>: {s.mounted(on.length)} {onUnmount && <Button variant="link" isInline onClick={() => onUnmount(pool)}>{s.unmount}</Button>}</p>
              {on.filter((m) => m.warning || !m.usable).map((m) => <Alert key={m.host + m.datastore} isInline isPlain variant="warning" component="h3" title={`${m.host}: ${m.warning || s.unusable}`} />)}
              <Table aria-label={pool} variant="compact">
                <Thead><Tr><Th>{s.host}</Th><Th>{s.datastore}</Th><Th>{s.export}</Th><Th>{s.usable}</Th></Tr></Thead>
                <Tbody>
                  {on.map((m) => (
                    <Tr key={m.host + m.datastore}>
                      <Td dataLabel={s.host}>{m.host}</Td><Td dataLabel={s.datastore}>{m.datastore}</Td><Td dataLabel={s.export}><span className="varve-mono">{m.server}:{m.export}</span></Td>
                      <Td dataLabel={s.usable}>{m.usable ? (m.read_only ? s.readOnly : storage.yes) : storage.no}</Td>
                    </Tr>
                  ))}
                </Tbody>
              </Table>
            </div>
          );
        })}
      </CardBody></Card>
    </>
  );
}

function Edit({ pmachine, onClose }: { pmachine: PMachine; onClose: () => void }) {
  const reach = useReach(pmachine.kind, pmachine);
  const toast = useToast();
  const refresh = useRefresh();
  return (
    <FormDialog title={s.editTitle(pmachine.name)} submit={t.save} onClose={onClose} disabled={!reach.address} onSubmit={async () => {
      await call('patchPMachine', { path: { pmachine: pmachine.name }, rev: pmachine.rev, body: reach.body });
      await refresh(...read);
      toast.done(s.saved);
    }}>
      {reach.fields}
    </FormDialog>
  );
}

function MountOn({ pmachine, onClose }: { pmachine: PMachine; onClose: () => void }) {
  const pools = useCall('listVPools', { query: { limit: 1000 } });
  const [pool, setPool] = useState('');
  const [hosts, setHosts] = useState<string[]>([]);
  const [datastore, setDatastore] = useState('');
  const [address, setAddress] = useState('');
  const toast = useToast();
  const refresh = useRefresh();
  const names = (pools.data?.items ?? []).map((p) => p.name);
  const which = pool || names[0] || '';
  return (
    <FormDialog title={s.mountTitle(pmachine.name)} submit={s.mount} onClose={onClose} disabled={!which} onSubmit={async () => {
      const made = await call('mountOnPMachine', {
        path: { pmachine: pmachine.name },
        body: { vpool: which, ...(hosts.length > 0 ? { hosts } : {}), ...(datastore ? { datastore } : {}), ...(address ? { address } : {}) },
      });
      await refresh(...read);
      const failed = made.hosts.filter((h) => h.error);
      if (failed.length > 0) throw new Error(failed.map((h) => `${s.failed(h.host)}: ${h.error ?? ''}`).join('\n'));
      toast.done(`${which}: ${s.mounted(made.hosts.length)}`);
    }}>
      <SelectField label={s.vpool} name="vpool" value={which} onChange={setPool} options={names.map((n) => [n, n])} />
      {pmachine.hosts.length > 1 && <ChoicesField label={s.which} name="hosts" value={hosts} onChange={setHosts} options={pmachine.hosts.map((h) => [h.name, h.name])} help={s.allHosts} />}
      <TextField label={s.datastore} name="datastore" value={datastore} onChange={setDatastore} help={s.datastoreHelp} />
      <TextField label={s.server} name="address" value={address} onChange={setAddress} mono help={s.serverHelp} />
    </FormDialog>
  );
}
