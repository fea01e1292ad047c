// One vDisk: what it is, its snapshots, its figures, its limits.
import { Button, Card, CardBody, CardTitle, ClipboardCopy, Form } from '@patternfly/react-core';
import { useState } from 'react';
import { Link, useNavigate, useParams } from 'react-router';
import { call } from '../api/call';
import type { Answer } from '../api/call';
import { useCall, useRefresh } from '../api/query';
import { useMay } from '../api/session';
import { t } from '../strings';
import { storage } from '../strings/storage';
import { ActionMenu } from '../ui/ActionMenu';
import type { MenuAction } from '../ui/ActionMenu';
import { Charts } from '../ui/Chart';
import { Destroy, FormDialog } from '../ui/dialog';
import { CheckField, TextField } from '../ui/fields';
import { bytes, bytesDecimal, duration, number, parseBytes, splitName, time } from '../ui/format';
import { nodePath, vdiskPath, vpoolPath } from '../ui/names';
import { Loaded, Page } from '../ui/Page';
import { settingName, settingText } from '../ui/policy';
import { Bytes, LastKnown, State, When } from '../ui/State';
import { useToast } from '../ui/toast';
import { EventList } from './parts/EventList';
import { SnapshotTable } from './parts/SnapshotTable';
import { CloneVDisk, DeleteVDisk, RenameVDisk, ResizeVDisk, TakeSnapshot } from './parts/VDiskDialogs';
import { vdiskState } from './parts/VDiskTable';
import { Facts } from '../ui/Facts';
import { URLTabs } from '../ui/URLTabs';

const s = storage.vdisks;
type VDisk = Answer<'getVDisk'>;
type Dialog = '' | 'snapshot' | 'clone' | 'resize' | 'rename' | 'delete' | 'template' | 'flatten' | 'promote' | 'rewind';

export default function VDiskPage() {
  const { vdisk = '' } = useParams();
  const query = useCall('getVDisk', { path: { vdisk } }, { every: 5_000 });
  const may = useMay();
  const go = useNavigate();
  const [dialog, setDialog] = useState<Dialog>('');
  const close = () => setDialog('');
  const d = query.data;
  const to = (d: Dialog) => () => setDialog(d);
  const more: MenuAction[] = d ? [
    { title: s.clone, disabled: !may('cloneVDisk'), onClick: to('clone') }, { title: s.resize, disabled: !may('patchVDisk') || d.template, onClick: to('resize') },
    { title: s.rename, disabled: !may('patchVDisk'), onClick: to('rename') }, { title: d.template ? s.untemplate : s.template, disabled: !may('setTemplate'), onClick: to('template') },
    { title: s.rewind, disabled: !may('rewindVDisk'), onClick: to('rewind') }, ...(d.parent ? [{ title: s.flatten, disabled: !may('flattenVDisk'), onClick: to('flatten') }, { title: s.promote, disabled: !may('promoteVDisk'), onClick: to('promote') }] : []),
    { title: s.delete, disabled: !may('deleteVDisk'), danger: true, separated: true, onClick: to('delete') },
  ] : [];
  return (
    <Page title={vdisk} trail={[[s.title, '/vdisks']]} label={d && <><State value={vdiskState(d)} /> <LastKnown at={d.as_of} /></>} names={{ vdisk }}
      operations={['getVDisk', 'createSnapshot', 'cloneVDisk', 'rollbackVDisk', 'patchVDisk', 'deleteVDisk', 'setTemplate', 'getLedger', 'waitLevel', 'explainVDisk', 'listSnapshots', 'patchSnapshot',
        'deleteSnapshot', 'getPolicy', 'setPolicy', 'flattenVDisk', 'promoteVDisk', 'rewindVDisk', 'getHistory']}
      actions={d && (
        <>
          {may('createSnapshot') && <Button onClick={() => setDialog('snapshot')}>{s.snapshot}</Button>}
          <ActionMenu label={storage.actions} actions={more} />
        </>
      )}>
      <Loaded query={query}>
        {(data) => (
          <URLTabs label={vdisk} tabs={[
            ['overview', s.overview, () => <Overview d={data} />],
            ['snapshots', s.snapshots, () => <SnapshotTable disk={data} />],
            ['performance', s.performance, () => <Charts object={`vdisk:${data.name}`} />],
            ['settings', s.settings, () => <Limits d={data} />],
            ['events', s.events, () => <EventList objectKey={data.id} />],
          ]} />
        )}
      </Loaded>
      {d && dialog === 'snapshot' && <TakeSnapshot disk={d.name} onClose={close} />}
      {d && dialog === 'clone' && <CloneVDisk disk={d.name} onClose={close} />}
      {d && dialog === 'resize' && <ResizeVDisk disk={d} onClose={close} />}
      {d && dialog === 'rename' && <RenameVDisk disk={d} onClose={close} onRenamed={(name) => void go(vdiskPath(name), { replace: true })} />}
      {d && dialog === 'delete' && <DeleteVDisk disk={d} onClose={close} onDeleted={() => void go('/vdisks')} />}
      {d && dialog === 'template' && <Template d={d} onClose={close} />}
      {d && dialog === 'flatten' && <Flatten d={d} onClose={close} />}
      {d && dialog === 'promote' && <Promote d={d} onClose={close} />}
      {d && dialog === 'rewind' && <Rewind d={d} onClose={close} />}
    </Page>
  );
}

function Overview({ d }: { d: VDisk }) {
  const { pool } = splitName(d.name);
  const status = useCall('getStatus', {}, { every: 30_000 });
  const address = (name: string) => status.data?.services.find((x) => x.name === name)?.address ?? '';
  const [host = location.hostname, port = '10809'] = [location.hostname, address('nbd').split(':').pop()];
  return (
    <div className="varve-grid">
      <Card><CardTitle component="h2">{s.overview}</CardTitle><CardBody>
        <Facts items={[
          [storage.size, <Bytes n={d.size} />], [storage.used, <Bytes n={d.used} />], [storage.vpool, <Link to={vpoolPath(pool)}>{pool}</Link>], [s.owner, d.owner ? <Link to={nodePath(d.owner)}>{d.owner}</Link> : storage.none],
          [s.clients, d.clients], [s.class, d.class], [s.parent, d.parent ?? storage.none], [s.epoch, d.epoch], [storage.created, <When at={d.created} exact />], [storage.modified, <When at={d.modified} />],
          [storage.id, <span className="varve-mono">{d.id}</span>],
        ]} />
      </CardBody></Card>
      <Ledger d={d} />
      <Card><CardTitle component="h2">{s.connect}</CardTitle><CardBody className="varve-stack">
        <ClipboardCopy isReadOnly isCode hoverTip={s.connect} clickTip={s.connect} textAriaLabel={s.nbd}>{`nbd://${host}${port === '10809' ? '' : `:${port}`}/${d.name}`}</ClipboardCopy>
        <ClipboardCopy isReadOnly isCode hoverTip={s.connect} clickTip={s.connect} textAriaLabel={s.nfs}>{`${host}:/${pool}/${d.file.replace(/^\//, '')}`}</ClipboardCopy>
      </CardBody></Card>
      <Explain d={d} />
    </div>
  );
}

/** How far what was acknowledged has come, and what would be lost with this node's disk. */
function Ledger({ d }: { d: VDisk }) {
  const ledger = useCall('getLedger', { path: { vdisk: d.name } }, { every: 3_000 });
  const may = useMay();
  const toast = useToast();
  const [busy, setBusy] = useState(false);
  const wait = () => {
    setBusy(true);
    call('waitLevel', { path: { vdisk: d.name }, body: { level: 'backed', seconds: 300 } })
      .then(() => toast.done(s.flushed), (e: unknown) => toast.failed(e)).finally(() => { setBusy(false); void ledger.refetch(); });
  };
  return (
    <Card><CardTitle component="h2">{s.ledger}</CardTitle><CardBody className="varve-stack">
      <Loaded query={ledger}>
        {(l) => (
          <Facts items={[
            [s.atStake, <Bytes n={l.unbacked_bytes} />], [s.oldest, l.unbacked_bytes > 0 ? duration(l.unbacked_seconds) : storage.none], [s.unlogged, <Bytes n={l.unlogged_bytes} />],
            [s.accepted, number(l.accepted)], [s.logged, number(l.logged)], [s.backed, number(l.backed)],
          ]} />
        )}
      </Loaded>
      {may('waitLevel') && <div><Button variant="secondary" onClick={wait} isLoading={busy} isDisabled={busy}>{s.flushNow}</Button></div>}
    </CardBody></Card>
  );
}

function Explain({ d }: { d: VDisk }) {
  const [offset, setOffset] = useState('0');
  const [answer, setAnswer] = useState<Answer<'explainVDisk'>>();
  const toast = useToast();
  const n = parseBytes(offset);
  return (
    <Card><CardTitle component="h2">{s.explain}</CardTitle><CardBody className="varve-stack">
      <Form onSubmit={(e) => { e.preventDefault(); call('explainVDisk', { path: { vdisk: d.name }, query: { offset: n } }).then(setAnswer, (x: unknown) => toast.failed(x)); }}>
        <TextField label={s.explainOffset} name="offset" value={offset} onChange={setOffset} wrong={Number.isNaN(n) ? s.sizeWrong : undefined} />
        <div><Button type="submit" variant="secondary" isDisabled={Number.isNaN(n)}>{s.explainGo}</Button></div>
      </Form>
      {answer && <p aria-live="polite"><State value={answer.state} /> {answer.detail} <span className="varve-mono varve-dim">{answer.object} {answer.crc}</span></p>}
    </CardBody></Card>
  );
}

type Effective = Record<string, { value: unknown; source: string } | undefined>;

function Limits({ d }: { d: VDisk }) {
  const scope = `vdisk:${d.name}`;
  const policy = useCall('getPolicy', { path: { scope } });
  const may = useMay();
  const [editing, setEditing] = useState(false);
  return (
    <Loaded query={policy}>
      {(p) => {
        const e = p.effective as unknown as Effective;
        const keys = ['iops_max', 'bytes_max', ...Object.keys(e).filter((k) => k !== 'iops_max' && k !== 'bytes_max')];
        return (
          <div className="varve-stack">
            <Facts items={keys.map((k) => [settingName(k), (
              <>{settingText(k, e[k]?.value ?? (k === 'iops_max' || k === 'bytes_max' ? 0 : undefined))} <span className="varve-dim">{s.source(e[k]?.source ?? 'default')}</span></>
            )])} />
            {may('setPolicy') && <div><Button variant="secondary" onClick={() => setEditing(true)}>{s.setLimits}</Button></div>}
            {editing && <SetLimits scope={scope} policy={p} onClose={() => setEditing(false)} />}
          </div>
        );
      }}
    </Loaded>
  );
}

function SetLimits({ scope, policy, onClose }: { scope: string; policy: Answer<'getPolicy'>; onClose: () => void }) {
  const set = policy.set as { iops_max?: number; bytes_max?: number };
  const [iops, setIOPS] = useState(set.iops_max === undefined ? '' : String(set.iops_max));
  const [rate, setRate] = useState(set.bytes_max === undefined ? '' : bytes(set.bytes_max).replace(' ', ''));
  const toast = useToast();
  const refresh = useRefresh();
  return (
    <FormDialog title={s.setLimits} description={s.limitsHelp} submit={s.setLimits} onClose={onClose} disabled={(iops !== '' && !/^\d+$/.test(iops)) || (rate !== '' && Number.isNaN(parseBytes(rate)))}
      onSubmit={async () => {
        const { iops_max: _i, bytes_max: _b, ...rest } = policy.set as Record<string, unknown>;
        await call('setPolicy', { path: { scope }, rev: policy.rev, body: { ...rest, ...(iops ? { iops_max: Number(iops) } : {}), ...(rate ? { bytes_max: parseBytes(rate) } : {}) } });
        await refresh('getPolicy', 'listPolicies');
        toast.done(s.limitsSaved);
      }}>
      <TextField label={s.iops} name="iops_max" value={iops} onChange={setIOPS} autoFocus />
      <TextField label={s.bytesPerSecond} name="bytes_max" value={rate} onChange={setRate} help="100MiB" />
    </FormDialog>
  );
}

function Template({ d, onClose }: { d: VDisk; onClose: () => void }) {
  const [force, setForce] = useState(false);
  const toast = useToast();
  const refresh = useRefresh();
  const title = d.template ? s.untemplate : s.templateTitle(d.name);
  return (
    <FormDialog title={title} description={s.templateBody} submit={d.template ? s.untemplate : s.template} onClose={onClose} onSubmit={async () => {
      await call('setTemplate', { path: { vdisk: d.name }, body: { template: !d.template, ...(force ? { force } : {}) } });
      await refresh('getVDisk', 'listVDisks', 'listTemplates');
      toast.done(d.template ? s.templateUndone(d.name) : s.templateDone(d.name));
    }}>
      {d.open && <CheckField label={s.force} name="force" value={force} onChange={setForce} />}
    </FormDialog>
  );
}

function Flatten({ d, onClose }: { d: VDisk; onClose: () => void }) {
  const toast = useToast();
  const refresh = useRefresh();
  return (
    <FormDialog title={s.flattenTitle(d.name)} description={bytesDecimal(d.used)} submit={s.flatten} onClose={onClose} onSubmit={async () => {
      await call('flattenVDisk', { path: { vdisk: d.name } });
      await refresh('listTasks');
      toast.done(s.flattenStarted);
    }}>
      {null}
    </FormDialog>
  );
}

function Promote({ d, onClose }: { d: VDisk; onClose: () => void }) {
  const toast = useToast();
  const refresh = useRefresh();
  return (
    <Destroy title={s.promoteTitle(d.name)} verb={s.promote} op="promoteVDisk" args={{ path: { vdisk: d.name } }} onClose={onClose}
      onDone={() => { toast.done(s.promoted(d.name)); void refresh('getVDisk', 'listVDisks', 'listSnapshots'); }}>
      <p>{s.promoteBody(d.parent ?? '')}</p>
    </Destroy>
  );
}

function Rewind({ d, onClose }: { d: VDisk; onClose: () => void }) {
  const range = useCall('getRewind', { path: { vdisk: d.name } });
  const [at, setAt] = useState('');
  const [name, setName] = useState(`${d.name}-then`);
  const toast = useToast();
  const refresh = useRefresh();
  const from = range.data?.from;
  return (
    <FormDialog title={s.rewindTitle(d.name)} description={from ? s.rewindHelp(time(from)) : s.rewindNone} submit={t.create} onClose={onClose} disabled={!from || !at} onSubmit={async () => {
      await call('rewindVDisk', { path: { vdisk: d.name }, body: { at: new Date(at).toISOString(), ...(name ? { name } : {}) } });
      await refresh('listTasks');
      toast.done(s.rewindStarted);
    }}>
      <TextField label={s.rewindAt} name="at" value={at} onChange={setAt} required placeholder={new Date().toISOString().slice(0, 19)} help="2026-01-31T15:04:05" />
      <TextField label={s.rewindName} name="name" value={name} onChange={setName} mono />
    </FormDialog>
  );
}
