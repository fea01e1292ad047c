// The snapshots of a vDisk.
import { Button, Modal, ModalBody, ModalHeader } from '@patternfly/react-core';
import { CameraIcon } from '@patternfly/react-icons';
import { useState } from 'react';
import { call } from '../../api/call';
import type { Answer, ItemOf } from '../../api/call';
import { useCall, useRefresh } from '../../api/query';
import { useMay } from '../../api/session';
import { t } from '../../strings';
import { storage } from '../../strings/storage';
import { Destroy, DestroyMany, FormDialog } from '../../ui/dialog';
import { CheckField, TextField } from '../../ui/fields';
import { number } from '../../ui/format';
import { ObjectTable } from '../../ui/ObjectTable';
import { Loaded } from '../../ui/Page';
import { Bytes, When } from '../../ui/State';
import { useToast } from '../../ui/toast';
import { Facts } from '../../ui/Facts';
import { CloneVDisk, RollBack, TakeSnapshot } from './VDiskDialogs';

const s = storage.snapshots;
type Snapshot = ItemOf<'listSnapshots'>;
type Doing = { what: 'rollback' | 'clone' | 'rename' | 'delete' | 'details'; snapshot: Snapshot } | { what: 'take' } | { what: 'deleteMany'; snapshots: Snapshot[] };

export function SnapshotTable({ disk }: { disk: Answer<'getVDisk'> }) {
  const may = useMay();
  const toast = useToast();
  const refresh = useRefresh();
  const [doing, setDoing] = useState<Doing>();
  const [force, setForce] = useState(false);
  const done = () => { setDoing(undefined); setForce(false); };
  const keep = (x: Snapshot, sticky: boolean): Promise<void> => call('patchSnapshot', { path: { vdisk: disk.name, snapshot: x.id }, body: { sticky } }).then(
    () => { void refresh('listSnapshots'); toast.done(sticky ? s.kept(x.name) : s.unkept(x.name), { text: storage.vdisks.undone, do: () => void keep(x, !sticky) }); }, (e: unknown) => toast.failed(e));
  const take = may('createSnapshot') && <Button variant="secondary" onClick={() => setDoing({ what: 'take' })}>{s.take}</Button>;
  return (
    <>
      <ObjectTable id="snapshots" label={storage.vdisks.snapshots} op="listSnapshots" args={{ path: { vdisk: disk.name } }} rowKey={(x: Snapshot) => x.id} sort="-created" tools={take}
        columns={[
          { key: 'name', title: s.name, cell: (x) => <Button variant="link" isInline onClick={() => setDoing({ what: 'details', snapshot: x })}>{x.name}</Button> },
          { key: 'created', title: s.created, cell: (x) => <When at={x.created} exact /> },
          { key: 'automatic', title: s.kind, cell: (x) => (x.automatic ? s.automatic : s.manual) },
          { key: 'sticky', title: s.sticky, cell: (x) => (x.sticky ? storage.yes : storage.no) },
          { key: 'consistent', title: s.consistent, hidden: true, cell: (x) => (x.consistent ? storage.yes : storage.no) },
          { key: 'backed', title: s.backed, cell: (x) => (x.backed ? storage.yes : storage.no) },
          { key: 'clones', title: s.clones, right: true, cell: (x) => x.clones },
          { key: 'size', title: s.size, right: true, hidden: true, cell: (x) => <Bytes n={x.size} /> },
        ]}
        facets={[{ key: 'automatic', title: s.kind, options: [['true', s.automatic], ['false', s.manual]] }]}
        actions={(x) => [
          { title: s.rollback, disabled: !may('rollbackVDisk'), onClick: () => setDoing({ what: 'rollback', snapshot: x }) },
          { title: s.clone, disabled: !may('cloneVDisk'), onClick: () => setDoing({ what: 'clone', snapshot: x }) },
          { title: x.sticky ? s.unkeep : s.keep, disabled: !may('patchSnapshot'), onClick: () => void keep(x, !x.sticky) },
          { title: s.rename, disabled: !may('patchSnapshot'), onClick: () => setDoing({ what: 'rename', snapshot: x }) },
          { title: s.delete, danger: true, separated: true, disabled: !may('deleteSnapshot'), onClick: () => setDoing({ what: 'delete', snapshot: x }) },
        ]}
        bulk={may('deleteSnapshot') ? [{ title: s.delete, danger: true, onClick: (snapshots) => setDoing({ what: 'deleteMany', snapshots }) }] : []}
        empty={{ title: s.empty, body: s.emptyBody, action: take, icon: CameraIcon }} />
      {doing?.what === 'take' && <TakeSnapshot disk={disk.name} onClose={done} />}
      {doing?.what === 'rollback' && <RollBack disk={disk} snapshot={doing.snapshot} onClose={done} />}
      {doing?.what === 'clone' && <CloneVDisk disk={disk.name} snapshot={doing.snapshot.id} onClose={done} />}
      {doing?.what === 'rename' && <Rename disk={disk.name} snapshot={doing.snapshot} onClose={done} />}
      {doing?.what === 'details' && <Details disk={disk.name} snapshot={doing.snapshot} onClose={done} />}
      {doing?.what === 'delete' && (
        <Destroy title={s.deleteTitle(doing.snapshot.name)} verb={t.remove} op="deleteSnapshot" args={{ path: { vdisk: disk.name, snapshot: doing.snapshot.id }, query: force ? { force } : {} }}
          onDone={() => { toast.done(s.deleted(doing.snapshot.name)); void refresh('listSnapshots'); }} onClose={done}>
          {doing.snapshot.sticky && <CheckField label={s.force} name="force" value={force} onChange={setForce} />}
        </Destroy>
      )}
      {doing?.what === 'deleteMany' && (
        <DestroyMany title={s.deleteMany(doing.snapshots.length)} verb={t.remove} items={doing.snapshots} name={(x) => x.name} onClose={done}
          act={(x) => call('deleteSnapshot', { path: { vdisk: disk.name, snapshot: x.id }, query: { confirm: x.name } })}
          onDone={() => { void refresh('listSnapshots'); toast.done(s.deleted(String(doing.snapshots.length))); }} />
      )}
    </>
  );
}

function Rename({ disk, snapshot, onClose }: { disk: string; snapshot: Snapshot; onClose: () => void }) {
  const [name, setName] = useState(snapshot.name);
  const refresh = useRefresh();
  return (
    <FormDialog title={`${s.rename} ${snapshot.name}`} submit={s.rename} onClose={onClose} disabled={!name || name === snapshot.name} onSubmit={async () => {
      await call('patchSnapshot', { path: { vdisk: disk, snapshot: snapshot.id }, body: { name } });
      await refresh('listSnapshots');
    }}>
      <TextField label={s.name} name="name" value={name} onChange={setName} required autoFocus />
    </FormDialog>
  );
}

function Details({ disk, snapshot, onClose }: { disk: string; snapshot: Snapshot; onClose: () => void }) {
  const query = useCall('getSnapshot', { path: { vdisk: disk, snapshot: snapshot.id } });
  return (
    <Modal isOpen variant="small" onClose={onClose} aria-labelledby="snapshot-title">
      <ModalHeader title={snapshot.name} labelId="snapshot-title" />
      <ModalBody>
        <Loaded query={query}>
          {(x) => (
            <Facts items={[
              [s.created, <When at={x.snapshot.created} exact />], [s.unique, <Bytes n={x.unique} />], [s.shared, <Bytes n={x.shared} />], [s.size, <Bytes n={x.snapshot.size} />],
              [s.kind, x.snapshot.automatic ? s.automatic : s.manual], [s.sticky, x.snapshot.sticky ? storage.yes : storage.no], [s.consistent, x.snapshot.consistent ? storage.yes : storage.no], [s.clones, x.snapshot.clones],
              [s.seq, number(x.snapshot.seq)], [s.labels, Object.entries(x.snapshot.labels ?? {}).map(([k, v]) => `${k}=${v}`).join(', ') || storage.none],
            ]} />
          )}
        </Loaded>
      </ModalBody>
    </Modal>
  );
}
