// What can be done to a VM, one dialog each.
import { useState } from 'react';
import { call } from '../../api/call';
import type { ItemOf } from '../../api/call';
import { useCall, useRefresh } from '../../api/query';
import { machines } from '../../strings/machines';
import { Destroy, FormDialog } from '../../ui/dialog';
import { CheckField, SelectField, TextAreaField, TextField } from '../../ui/fields';
import { time } from '../../ui/format';
import { useToast } from '../../ui/toast';

const s = machines.vmachines;
const sn = machines.snapshots;
type VMachine = ItemOf<'listVMachines'>;
type Snapshot = ItemOf<'listVMachineSnapshots'>;

const read = ['listVMachines', 'getVMachine', 'listVMachineSnapshots', 'listTasks', 'listSnapshots'] as const;

export function TakeVMachineSnapshot({ vm, onClose }: { vm: VMachine; onClose: () => void }) {
  const [name, setName] = useState('');
  const [consistent, setConsistent] = useState(false);
  const [sticky, setSticky] = useState(false);
  const [partial, setPartial] = useState(false);
  const toast = useToast();
  const refresh = useRefresh();
  const outside = vm.disks.some((d) => !d.vdisk);
  return (
    <FormDialog title={`${sn.take}: ${vm.name}`} submit={sn.take} onClose={onClose} disabled={outside && !partial} onSubmit={async () => {
      const made = await call('createVMachineSnapshot', { path: { vmachine: vm.id }, body: { consistent, sticky, ...(partial ? { partial } : {}), ...(name ? { name } : {}) } });
      await refresh(...read);
      toast.done(sn.taken(made.name));
    }}>
      <TextField label={sn.name} name="name" value={name} onChange={setName} autoFocus help={sn.nameHelp} />
      <CheckField label={sn.consistent} name="consistent" value={consistent} onChange={setConsistent} help={sn.consistentHelp} />
      <CheckField label={sn.keep} name="sticky" value={sticky} onChange={setSticky} />
      {outside && <CheckField label={sn.partial} name="partial" value={partial} onChange={setPartial} />}
    </FormDialog>
  );
}

export function CloneVMachine({ vm, snapshot, onClose }: { vm: VMachine; snapshot?: string; onClose: () => void }) {
  const snapshots = useCall('listVMachineSnapshots', { path: { vmachine: vm.id }, query: { limit: 1000 } });
  const [names, setNames] = useState(`${vm.name}-clone`);
  const [from, setFrom] = useState(snapshot ?? '');
  const toast = useToast();
  const refresh = useRefresh();
  const list = names.split('\n').map((x) => x.trim()).filter(Boolean);
  return (
    <FormDialog title={s.cloneTitle(vm.name)} submit={s.clone} onClose={onClose} disabled={list.length === 0} onSubmit={async () => {
      await call('cloneVMachine', { path: { vmachine: vm.id }, body: { names: list, ...(from ? { snapshot: from } : {}) } });
      await refresh(...read);
      toast.done(s.cloneStarted);
    }}>
      <TextAreaField label={s.names} name="names" value={names} onChange={setNames} required mono help={s.namesHelp} />
      <SelectField label={s.from} name="snapshot" value={from} onChange={setFrom}
        options={[['', s.now], ...[...(snapshots.data?.items ?? [])].reverse().map((x) => [x.id, `${x.name} (${time(x.created)})`] as [string, string])]} />
    </FormDialog>
  );
}

export function DeleteVMachine({ vm, onClose, onDeleted }: { vm: VMachine; onClose: () => void; onDeleted: () => void }) {
  const [purge, setPurge] = useState(false);
  const [force, setForce] = useState(false);
  const toast = useToast();
  const refresh = useRefresh();
  return (
    <Destroy title={s.deleteTitle(vm.name)} verb={s.remove} op="deleteVMachine" args={{ path: { vmachine: vm.id }, query: { ...(purge ? { purge } : {}), ...(force ? { force } : {}) } }} onClose={onClose}
      onDone={() => {
        void refresh(...read);
        toast.done(s.deleted);
        onDeleted();
      }}>
      <CheckField label={s.purge} name="purge" value={purge} onChange={setPurge} />
      {(vm.power === 'running' || vm.clients > 0) && <CheckField label={s.force} name="force" value={force} onChange={setForce} />}
    </Destroy>
  );
}

export function VMachineTemplate({ vm, onClose }: { vm: VMachine; onClose: () => void }) {
  const [force, setForce] = useState(false);
  const toast = useToast();
  const refresh = useRefresh();
  return (
    <FormDialog title={vm.template ? s.makeVM : s.templateTitle(vm.name)} description={s.templateBody} submit={vm.template ? s.makeVM : s.makeTemplate} onClose={onClose} onSubmit={async () => {
      await call('setVMachineTemplate', { path: { vmachine: vm.id }, body: { template: !vm.template, ...(force ? { force } : {}) } });
      await refresh(...read);
      toast.done(vm.template ? s.templateUndone(vm.name) : s.templateDone(vm.name));
    }}>
      {vm.clients > 0 && !vm.template && <CheckField label={s.force} name="force" value={force} onChange={setForce} />}
    </FormDialog>
  );
}

export function RollBackVMachine({ vm, snapshot, onClose }: { vm: VMachine; snapshot: Snapshot; onClose: () => void }) {
  const [force, setForce] = useState(false);
  const toast = useToast();
  const refresh = useRefresh();
  return (
    <Destroy title={sn.rollbackTitle(vm.name, snapshot.name)} verb={s.rollback} op="rollbackVMachine" args={{ path: { vmachine: vm.id }, body: { snapshot: snapshot.id, ...(force ? { force } : {}) } }} onClose={onClose}
      onDone={() => {
        void refresh(...read);
        toast.done(sn.rollbackStarted);
      }}>
      {(vm.power === 'running' || vm.clients > 0) && <CheckField label={sn.forceRunning} name="force" value={force} onChange={setForce} />}
    </Destroy>
  );
}

export function DeleteVMachineSnapshot({ vm, snapshot, onClose }: { vm: VMachine; snapshot: Snapshot; onClose: () => void }) {
  const [force, setForce] = useState(false);
  const toast = useToast();
  const refresh = useRefresh();
  return (
    <Destroy title={sn.deleteTitle(snapshot.name)} verb={sn.remove} op="deleteVMachineSnapshot" args={{ path: { vmachine: vm.id, snapshot: snapshot.id }, query: force ? { force } : {} }} onClose={onClose}
      onDone={() => {
        void refresh(...read);
        toast.done(sn.deleted(snapshot.name));
      }}>
      {snapshot.sticky && <CheckField label={sn.force} name="force" value={force} onChange={setForce} />}
    </Destroy>
  );
}
