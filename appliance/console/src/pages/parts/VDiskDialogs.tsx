// What can be done to a vDisk, one dialog each.
import { useState } from 'react';
import { useNavigate } from 'react-router';
import { call } from '../../api/call';
import type { Answer } from '../../api/call';
import { useCall, useRefresh } from '../../api/query';
import { t } from '../../strings';
import { storage } from '../../strings/storage';
import { Destroy, FormDialog } from '../../ui/dialog';
import { CheckField, SelectField, TextField } from '../../ui/fields';
import { bytes, parseBytes, splitName, time } from '../../ui/format';
import { vdiskPath } from '../../ui/names';
import { useToast } from '../../ui/toast';

const s = storage.vdisks;
const sn = storage.snapshots;
type VDisk = Answer<'getVDisk'>;

const read = ['listVDisks', 'getVDisk', 'listSnapshots', 'listTemplates', 'listTrash', 'listVPools'] as const;

export function CreateVDisk({ vpool, onClose }: { vpool?: string; onClose: () => void }) {
  const pools = useCall('listVPools', { query: { limit: 1000 } });
  const [pool, setPool] = useState(vpool ?? '');
  const [path, setPath] = useState('');
  const [size, setSize] = useState('20GiB');
  const toast = useToast();
  const refresh = useRefresh();
  const go = useNavigate();
  const names = (pools.data?.items ?? []).map((p) => p.name);
  const into = pool || names[0] || '';
  return (
    <FormDialog title={s.createTitle} submit={t.create} onClose={onClose} disabled={!into || !path || Number.isNaN(parseBytes(size))}
      onSubmit={async () => {
        const made = await call('createVDisk', { body: { name: `${into}/${path}`, size } });
        await refresh(...read);
        toast.done(s.made(made.name));
        void go(vdiskPath(made.name));
      }}>
      <SelectField label={storage.vpool} name="vpool" value={into} onChange={setPool} options={names.map((n) => [n, n])} disabled={Boolean(vpool)} />
      <TextField label={storage.name} name="name" value={path} onChange={setPath} required autoFocus mono help={s.nameHelp} />
      <TextField label={storage.size} name="size" value={size} onChange={setSize} required help={s.sizeHelp}
        wrong={size && Number.isNaN(parseBytes(size)) ? s.sizeWrong : undefined} />
    </FormDialog>
  );
}

export function TakeSnapshot({ disk, onClose }: { disk: string; onClose: () => void }) {
  const [name, setName] = useState('');
  const [consistent, setConsistent] = useState(false);
  const [sticky, setSticky] = useState(false);
  const toast = useToast();
  const refresh = useRefresh();
  return (
    <FormDialog title={`${sn.take}: ${disk}`} submit={sn.take} onClose={onClose} onSubmit={async () => {
      const made = await call('createSnapshot', { path: { vdisk: disk }, body: { consistent, sticky, ...(name ? { name } : {}) } });
      await refresh(...read);
      toast.done(s.snapshotTaken(made.name));
    }}>
      <TextField label={sn.name} name="name" value={name} onChange={setName} autoFocus help={sn.nameHelp} />
      <CheckField label={sn.consistent} name="consistent" value={consistent} onChange={setConsistent} help={sn.consistentHelp} />
      <CheckField label={sn.keep} name="sticky" value={sticky} onChange={setSticky} help={sn.stickyHelp} />
    </FormDialog>
  );
}

export function TakeSnapshots({ disks, onClose }: { disks: string[]; onClose: () => void }) {
  const [name, setName] = useState('');
  const toast = useToast();
  const refresh = useRefresh();
  return (
    <FormDialog title={s.snapshotMany(disks.length)} submit={sn.take} onClose={onClose} description={disks.join(', ')} onSubmit={async () => {
      await call('createSnapshotGroup', { body: { vdisks: disks, ...(name ? { name } : {}) } });
      await refresh(...read);
      toast.done(s.snapshotMany(disks.length));
    }}>
      <TextField label={sn.name} name="name" value={name} onChange={setName} autoFocus help={sn.nameHelp} />
    </FormDialog>
  );
}

export function CloneVDisk({ disk, snapshot, onClose }: { disk: string; snapshot?: string; onClose: () => void }) {
  const snapshots = useCall('listSnapshots', { path: { vdisk: disk }, query: { limit: 1000 } });
  const [name, setName] = useState(`${disk}-clone`);
  const [from, setFrom] = useState(snapshot ?? '');
  const toast = useToast();
  const refresh = useRefresh();
  const go = useNavigate();
  return (
    <FormDialog title={s.cloneOf(disk)} submit={s.clone} onClose={onClose} disabled={!splitName(name).path} onSubmit={async () => {
      await call('cloneVDisk', { path: { vdisk: disk }, body: { name, ...(from ? { snapshot: from } : {}) } });
      await refresh(...read);
      toast.done(s.made(name));
      void go(vdiskPath(name));
    }}>
      <TextField label={s.cloneName} name="name" value={name} onChange={setName} required autoFocus mono />
      <SelectField label={s.cloneFrom} name="snapshot" value={from} onChange={setFrom}
        options={[['', s.cloneNow], ...[...(snapshots.data?.items ?? [])].reverse().map((x) => [x.id, `${x.name} (${time(x.created)})`] as [string, string])]} />
    </FormDialog>
  );
}

export function ResizeVDisk({ disk, onClose }: { disk: VDisk; onClose: () => void }) {
  const [size, setSize] = useState(bytes(disk.size).replace(' ', ''));
  const [shrink, setShrink] = useState(false);
  const [asking, setAsking] = useState(false);
  const toast = useToast();
  const refresh = useRefresh();
  const n = parseBytes(size);
  const smaller = n < disk.size;
  const done = () => {
    void refresh(...read);
    toast.done(s.resized(disk.name));
  };
  if (asking) {
    return <Destroy title={`${s.resize} ${disk.name}`} verb={s.resize} op="patchVDisk" args={{ path: { vdisk: disk.name }, rev: disk.rev, body: { size, shrink: true } }} onDone={done} onClose={onClose} />;
  }
  return (
    <FormDialog title={`${s.resize} ${disk.name}`} submit={s.resize} onClose={onClose} disabled={Number.isNaN(n) || n === disk.size || (smaller && !shrink)} danger={smaller}
      onSubmit={async () => {
        if (smaller) {
          setAsking(true);
          return new Promise(() => undefined); // the confirmation takes this dialog's place
        }
        await call('patchVDisk', { path: { vdisk: disk.name }, rev: disk.rev, body: { size } });
        done();
      }}>
      <TextField label={s.newSize} name="size" value={size} onChange={setSize} required autoFocus help={s.sizeHelp} wrong={size && Number.isNaN(n) ? s.sizeWrong : undefined} />
      {smaller && <CheckField label={s.shrink} name="shrink" value={shrink} onChange={setShrink} help={s.shrinkHelp} />}
    </FormDialog>
  );
}

export function RenameVDisk({ disk, onClose, onRenamed }: { disk: VDisk; onClose: () => void; onRenamed?: (name: string) => void }) {
  const [name, setName] = useState(disk.name);
  const toast = useToast();
  const refresh = useRefresh();
  const rename = async (from: string, to: string) => {
    await call('patchVDisk', { path: { vdisk: from }, rev: 0, body: { name: to } });
    onRenamed?.(to);
    await refresh(...read);
  };
  return (
    <FormDialog title={`${s.rename} ${disk.name}`} submit={s.rename} onClose={onClose} disabled={name === disk.name || !splitName(name).path} onSubmit={async () => {
      await rename(disk.name, name);
      toast.done(s.renamed(name), { text: s.undone, do: () => void rename(name, disk.name).catch((e: unknown) => toast.failed(e)) });
    }}>
      <TextField label={s.newName} name="name" value={name} onChange={setName} required autoFocus mono help={s.nameHelp} />
    </FormDialog>
  );
}

export function DeleteVDisk({ disk, onClose, onDeleted }: { disk: VDisk; onClose: () => void; onDeleted?: () => void }) {
  const [purge, setPurge] = useState(false);
  const [force, setForce] = useState(false);
  const toast = useToast();
  const refresh = useRefresh();
  const restore = () => void call('restoreTrash', { path: { volume: disk.id }, body: {} }).then(
    () => { void refresh(...read); toast.done(s.restored(disk.name)); }, (e: unknown) => toast.failed(e));
  return (
    <Destroy title={s.deleteTitle(disk.name)} verb={s.delete} op="deleteVDisk" onClose={onClose}
      args={{ path: { vdisk: disk.name }, rev: 0, query: { ...(purge ? { purge } : {}), ...(force ? { force } : {}) } }}
      onDone={() => {
        toast.done(purge ? s.deleted(disk.name) : s.deleted(disk.name), purge ? undefined : { text: s.undo, do: restore });
        onDeleted?.();
        void refresh(...read);
      }}>
      <CheckField label={s.purge} name="purge" value={purge} onChange={setPurge} />
      {disk.open && <CheckField label={s.force} name="force" value={force} onChange={setForce} />}
    </Destroy>
  );
}

export function RollBack({ disk, snapshot, onClose }: { disk: VDisk; snapshot: { id: string; name: string }; onClose: () => void }) {
  const [force, setForce] = useState(false);
  const toast = useToast();
  const refresh = useRefresh();
  return (
    <Destroy title={sn.rollbackTitle(disk.name, snapshot.name)} verb={s.rollback} op="rollbackVDisk" onClose={onClose}
      args={{ path: { vdisk: disk.name }, body: { snapshot: snapshot.id, ...(force ? { force } : {}) } }}
      onDone={() => { toast.done(sn.rolled(disk.name, snapshot.name)); void refresh(...read); }}>
      {disk.open && <CheckField label={s.force} name="force" value={force} onChange={setForce} />}
    </Destroy>
  );
}
