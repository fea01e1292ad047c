// One vPool.
import { Alert, Button, Card, CardBody, CardTitle, Content } from '@patternfly/react-core';
import { Suspense, lazy, useState } from 'react';
import type { ReactNode } from 'react';
import { useNavigate, useParams } from 'react-router';
import { call } from '../api/call';
import type { Answer } from '../api/call';
import { useCall, useRefresh } from '../api/query';
import { useMay } from '../api/session';
import { t } from '../strings';
import { storage } from '../strings/storage';
import { Charts } from '../ui/Chart';
import { Destroy, FormDialog } from '../ui/dialog';
import { CheckField, TextAreaField, TextField } from '../ui/fields';
import { number, time } from '../ui/format';
import { Facts } from '../ui/Facts';
import { Loaded, Page } from '../ui/Page';
import { Bytes, Free, LastKnown, State, When } from '../ui/State';
import { useToast } from '../ui/toast';
import { URLTabs } from '../ui/URLTabs';
import { EventList } from './parts/EventList';
import { VDiskTable } from './parts/VDiskTable';

const MountHelper = lazy(() => import('./parts/Mount').then((m) => ({ default: m.Mount })));

const s = storage.vpools;
type VPool = Answer<'getVPool'>;

export default function VPoolPage() {
  const { vpool = '' } = useParams();
  const query = useCall('getVPool', { path: { vpool } }, { every: 15_000 });
  const may = useMay();
  const go = useNavigate();
  const toast = useToast();
  const [dialog, setDialog] = useState<'' | 'delete' | 'clients' | 'credentials' | 'keys'>('');
  const p = query.data;
  return (
    <Page title={vpool} trail={[[s.title, '/vpools']]} label={p && <State value={p.class} text={s.class[p.class] ?? p.class} />}
      operations={['getVPool', 'patchVPool', 'setVPoolCredentials', 'rotateVPoolKeys', 'testBackend', 'verifyVPool', 'deleteVPool', 'listCapacity', 'getBackend', 'getHistory']} names={{ vpool }}
      actions={may('deleteVPool') && <Button variant="secondary" isDanger onClick={() => setDialog('delete')}>{s.delete}</Button>}>
      <Loaded query={query}>
        {(data) => (
          <URLTabs label={vpool} tabs={[
            ['overview', s.overview, () => <VPoolOverview p={data} />],
            ['vdisks', s.vdisksTab, () => <VDiskTable vpool={data.name} />],
            ['hosts', s.hosts, () => <Suspense fallback={null}><MountHelper vpool={data.name} /></Suspense>],
            ['performance', s.performance, () => <Charts object={`vpool:${data.name}`} />],
            ['settings', s.settings, () => <VPoolSettings p={data} onClients={() => setDialog('clients')} onCredentials={() => setDialog('credentials')} onKeys={() => setDialog('keys')} />],
            ['events', s.events, () => <EventList topic="vpool" objectKey={data.id} />],
          ]} />
        )}
      </Loaded>
      {p && dialog === 'delete' && (
        <Destroy title={s.deleteTitle(p.name)} verb={t.remove} op="deleteVPool" args={{ path: { vpool: p.name }, rev: p.rev }}
          onDone={() => { toast.done(s.deleted(p.name)); void go('/vpools'); }} onClose={() => setDialog('')} />
      )}
      {p && dialog === 'keys' && (
        <Destroy title={s.rotateTitle(p.name)} verb={s.rotate} op="rotateVPoolKeys" args={{ path: { vpool: p.name } }} onDone={() => toast.done(s.rotateStarted)} onClose={() => setDialog('')} />
      )}
      {p && dialog === 'clients' && <Clients p={p} onClose={() => setDialog('')} />}
      {p && dialog === 'credentials' && <Credentials p={p} onClose={() => setDialog('')} />}
    </Page>
  );
}

function VPoolOverview({ p }: { p: VPool }) {
  const capacity = useCall('listCapacity', { query: { filter: `vpool="${p.name}"` } }, { every: 60_000 });
  const c = capacity.data?.items[0];
  return (
    <div className="varve-grid">
      <Card><CardTitle component="h2">{s.capacity}</CardTitle><CardBody>
        <Facts items={[
          [storage.used, <Bytes n={c?.used} />], [storage.free, <Free p={p} />], [storage.total, p.total > 0 ? <Bytes n={p.total} /> : storage.noLimit],
          [s.provisioned, <Bytes n={c?.provisioned} />], [s.growth, c?.growth === undefined ? storage.none : <Bytes n={c.growth} />],
          [s.forecast, c?.full ? time(c.full) : s.forecastNone],
        ]} />
        <LastKnown at={p.as_of} />
      </CardBody></Card>
      <Card><CardTitle component="h2">{s.hypervisor}</CardTitle><CardBody className="varve-stack">
        <Facts items={[[storage.total, <Bytes n={p.total} />], [storage.free, <Bytes n={p.free} />]]} />
        <p className="varve-dim">{s.hypervisorHelp}</p>
      </CardBody></Card>
      <Card className="varve-wide"><CardTitle component="h2">{s.settings}</CardTitle><CardBody>
        <Facts items={[
          [storage.backend, <span className="varve-mono">{p.backend}</span>], [s.durability, s.class[p.class] ?? p.class], [s.vdisks, number(p.vdisks)], [s.files, number(p.files)], [s.delegatedDelete, number(p.deleting)],
          [s.compression, p.compression ?? 'none'], [s.encrypted, p.encrypted ? storage.yes : storage.no], [s.clients, p.clients.join(', ') || storage.none], [storage.created, <When at={p.created} exact />],
          [storage.id, <span className="varve-mono">{p.id}</span>],
        ]} />
      </CardBody></Card>
    </div>
  );
}

function VPoolSettings({ p, onClients, onCredentials, onKeys }: { p: VPool; onClients: () => void; onCredentials: () => void; onKeys: () => void }) {
  const may = useMay();
  const backend = useCall('getBackend', { path: { vpool: p.name } }, { every: 30_000 });
  const [result, setResult] = useState<Answer<'testBackend'>>();
  const [busy, setBusy] = useState(false);
  const toast = useToast();
  const refresh = useRefresh();
  const test = () => {
    setBusy(true);
    call('testBackend', { path: { vpool: p.name } }).then(setResult, (e: unknown) => toast.failed(e)).finally(() => setBusy(false));
  };
  const verify = () => void call('verifyVPool', { path: { vpool: p.name } }).then(() => { toast.done(s.verifyStarted); void refresh('listTasks'); }, (e: unknown) => toast.failed(e));
  return (
    <div className="varve-stack">
      <Loaded query={backend}>
        {(b) => (
          <>
          <Facts items={[
            [storage.state, <><State value={b.state} /> <LastKnown at={b.as_of} /></>], [storage.backend, <span className="varve-mono">{b.url}</span>], ...(b.error ? [['', b.error] as [string, ReactNode]] : []),
            [s.clients, p.clients.join(', ') || storage.none],
          ]} />
          {Object.keys(b.findings).length > 0 && (
            <section aria-label={s.findings} className="varve-stack">
              <Content component="h2">{s.findings}</Content>
              <Facts items={Object.entries(b.findings).map(([k, v]) => [k.charAt(0).toUpperCase() + k.slice(1), v])} />
            </section>
          )}
          </>
        )}
      </Loaded>
      {result && (
        <Alert isInline variant={result.ok ? 'success' : 'danger'} title={result.ok ? s.testOK(result.duration_ms) : s.testBad} component="h2">
          {result.error} {Object.entries(result.findings ?? {}).map(([k, v]) => <p key={k}>{k}: {v}</p>)}
        </Alert>
      )}
      <div className="varve-row">
        {may('patchVPool') && <Button variant="secondary" onClick={onClients}>{s.edit}</Button>}
        {may('testBackend') && <Button variant="secondary" isLoading={busy} isDisabled={busy} onClick={test}>{s.test}</Button>}
        {may('verifyVPool') && <Button variant="secondary" onClick={verify}>{s.verify}</Button>}
        {may('setVPoolCredentials') && p.backend.startsWith('s3:') && <Button variant="secondary" onClick={onCredentials}>{s.credentials}</Button>}
        {may('rotateVPoolKeys') && p.encrypted && <Button variant="secondary" onClick={onKeys}>{s.rotate}</Button>}
      </div>
    </div>
  );
}

function Clients({ p, onClose }: { p: VPool; onClose: () => void }) {
  const [text, setText] = useState(p.clients.join('\n'));
  const toast = useToast();
  const refresh = useRefresh();
  return (
    <FormDialog title={s.edit} submit={t.save} onClose={onClose} onSubmit={async () => {
      await call('patchVPool', { path: { vpool: p.name }, rev: p.rev, body: { clients: text.split(/[\s,]+/).filter(Boolean) } });
      await refresh('getVPool', 'listVPools');
      toast.done(s.saved);
    }}>
      <TextAreaField label={s.clients} name="clients" value={text} onChange={setText} rows={6} mono help={s.clientsHelp} />
    </FormDialog>
  );
}

function Credentials({ p, onClose }: { p: VPool; onClose: () => void }) {
  const [access, setAccess] = useState('');
  const [secret, setSecret] = useState('');
  const [force, setForce] = useState(false);
  const toast = useToast();
  return (
    <FormDialog title={s.credentialsTitle} submit={t.save} onClose={onClose} disabled={!access || !secret} onSubmit={async () => {
      await call('setVPoolCredentials', { path: { vpool: p.name }, body: { access_key: access, secret_key: secret, force } });
      toast.done(s.credentialsDone);
    }}>
      <TextField label={s.access} name="access_key" value={access} onChange={setAccess} required mono />
      <TextField label={s.secret} name="secret_key" type="password" value={secret} onChange={setSecret} required autoComplete="new-password" help={s.secretHelp} />
      <CheckField label={s.force} name="force" value={force} onChange={setForce} />
    </FormDialog>
  );
}
