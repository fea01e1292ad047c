// The list of vDisks, of one vPool or of all, with what can be done to one and to many.
import { Button } from '@patternfly/react-core';
import { CubesIcon } from '@patternfly/react-icons';
import { useState } from 'react';
import { Link } from 'react-router';
import { call } from '../../api/call';
import type { ItemOf } from '../../api/call';
import { useRefresh } from '../../api/query';
import { useMay } from '../../api/session';
import { t } from '../../strings';
import { storage } from '../../strings/storage';
import { DestroyMany } from '../../ui/dialog';
import { nodePath, vdiskPath, vpoolPath } from '../../ui/names';
import { ObjectTable } from '../../ui/ObjectTable';
import { Bytes, LastKnown, State, When } from '../../ui/State';
import { useToast } from '../../ui/toast';
import { CloneVDisk, CreateVDisk, DeleteVDisk, RenameVDisk, ResizeVDisk, TakeSnapshot, TakeSnapshots } from './VDiskDialogs';

const s = storage.vdisks;
export type VDisk = ItemOf<'listVDisks'>;

export function vdiskState(d: VDisk): string {
  return d.template ? 'template' : d.open ? 'open' : d.state;
}

type Doing = { what: 'snapshot' | 'clone' | 'resize' | 'rename' | 'delete'; disk: VDisk } | { what: 'deleteMany' | 'snapshotMany'; disks: VDisk[] } | { what: 'create' };

export function VDiskTable({ vpool, onCreate }: { vpool?: string; onCreate?: () => void }) {
  const may = useMay();
  const toast = useToast();
  const refresh = useRefresh();
  const [doing, setDoing] = useState<Doing>();
  const done = () => setDoing(undefined);
  const create = may('createVDisk') && <Button onClick={onCreate ?? (() => setDoing({ what: 'create' }))}>{s.create}</Button>;
  return (
    <>
      <ObjectTable id="vdisks" label={s.title} op="listVDisks" {...(vpool ? { args: { query: { vpool } } } : {})} rowKey={(d: VDisk) => d.id} every={10_000} sort="name"
        tools={vpool ? create : undefined}
        columns={[
          { key: 'name', title: storage.name, cell: (d) => <Link to={vdiskPath(d.name)}>{d.name}</Link> },
          { key: 'state', title: storage.state, cell: (d) => <><State value={vdiskState(d)} /> <LastKnown at={d.as_of} /></> },
          { key: 'vpool', title: storage.vpool, hidden: true, cell: (d) => <Link to={vpoolPath(d.vpool)}>{d.vpool}</Link> },
          { key: 'owner', title: s.owner, cell: (d) => (d.owner ? <Link to={nodePath(d.owner)}>{d.owner}</Link> : storage.none) },
          { key: 'size', title: storage.size, right: true, cell: (d) => <Bytes n={d.size} /> },
          { key: 'used', title: storage.used, right: true, cell: (d) => <Bytes n={d.used} /> },
          { key: 'pending', title: s.pending, right: true, cell: (d) => <Bytes n={d.pending} /> },
          { key: 'clients', title: s.clients, right: true, cell: (d) => d.clients },
          { key: 'class', title: s.class, hidden: true, cell: (d) => d.class },
          { key: 'parent', title: s.parent, hidden: true, cell: (d) => d.parent ?? '' },
          { key: 'file', title: s.nfs, hidden: true, cell: (d) => <span className="varve-mono">{d.file}</span> },
          { key: 'modified', title: storage.modified, hidden: true, cell: (d) => <When at={d.modified} /> },
          { key: 'created', title: storage.created, hidden: true, cell: (d) => <When at={d.created} /> },
        ]}
        facets={[
          { key: 'open', title: storage.openState, options: [['true', storage.yes], ['false', storage.no]] },
          { key: 'template', title: storage.templateState, options: [['true', storage.yes], ['false', storage.no]] },
        ]}
        actions={(d) => [
          { title: s.snapshot, disabled: !may('createSnapshot'), onClick: () => setDoing({ what: 'snapshot', disk: d }) },
          { title: s.clone, disabled: !may('cloneVDisk'), onClick: () => setDoing({ what: 'clone', disk: d }) },
          { title: s.resize, disabled: !may('patchVDisk') || d.template === true, onClick: () => setDoing({ what: 'resize', disk: d }) },
          { title: s.rename, disabled: !may('patchVDisk'), onClick: () => setDoing({ what: 'rename', disk: d }) },
          { title: s.delete, danger: true, separated: true, disabled: !may('deleteVDisk'), onClick: () => setDoing({ what: 'delete', disk: d }) },
        ]}
        bulk={[
          ...(may('createSnapshotGroup') ? [{ title: s.snapshot, onClick: (disks: VDisk[]) => setDoing({ what: 'snapshotMany', disks }) }] : []),
          ...(may('deleteVDisk') ? [{ title: s.delete, danger: true, onClick: (disks: VDisk[]) => setDoing({ what: 'deleteMany', disks }) }] : []),
        ]}
        empty={{ title: s.empty, body: s.emptyBody, action: create, icon: CubesIcon }} />
      {doing?.what === 'create' && <CreateVDisk {...(vpool ? { vpool } : {})} onClose={done} />}
      {doing?.what === 'snapshot' && <TakeSnapshot disk={doing.disk.name} onClose={done} />}
      {doing?.what === 'clone' && <CloneVDisk disk={doing.disk.name} onClose={done} />}
      {doing?.what === 'resize' && <ResizeVDisk disk={doing.disk} onClose={done} />}
      {doing?.what === 'rename' && <RenameVDisk disk={doing.disk} onClose={done} />}
      {doing?.what === 'delete' && <DeleteVDisk disk={doing.disk} onClose={done} />}
      {doing?.what === 'snapshotMany' && <TakeSnapshots disks={doing.disks.map((d) => d.name)} onClose={done} />}
      {doing?.what === 'deleteMany' && (
        <DestroyMany title={s.deleteMany(doing.disks.length)} verb={t.remove} items={doing.disks} name={(d) => d.name} onClose={done}
          act={(d) => call('deleteVDisk', { path: { vdisk: d.name }, rev: 0, query: { confirm: d.name } })}
          onDone={() => { void refresh('listVDisks', 'listTrash'); toast.done(s.deleted(String(doing.disks.length))); }} />
      )}
    </>
  );
}
