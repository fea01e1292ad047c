// The VMs whose disks lie on vPools.
import { Button } from '@patternfly/react-core';
import { VirtualMachineIcon } from '@patternfly/react-icons';
import { useState } from 'react';
import { Link, useNavigate } from 'react-router';
import type { ItemOf } from '../api/call';
import { useMay } from '../api/session';
import { machines } from '../strings/machines';
import { storage } from '../strings/storage';
import { vmachinePath } from '../ui/names';
import { ObjectTable } from '../ui/ObjectTable';
import { Page } from '../ui/Page';
import { Bytes, State, When } from '../ui/State';
import { CloneVMachine, DeleteVMachine, TakeVMachineSnapshot } from './parts/VMachineDialogs';

const s = machines.vmachines;
type VMachine = ItemOf<'listVMachines'>;
type Doing = { what: 'snapshot' | 'clone' | 'delete'; vm: VMachine };

export default function VMachines() {
  const may = useMay();
  const go = useNavigate();
  const [doing, setDoing] = useState<Doing>();
  const close = () => setDoing(undefined);
  return (
    <Page title={s.title} lead={s.lead} operations={['listVMachines', 'createVMachineSnapshot', 'cloneVMachine', 'deleteVMachine']}>
      <ObjectTable id="vmachines" label={s.title} op="listVMachines" rowKey={(x: VMachine) => x.id} sort="name" every={30_000}
        columns={[
          { key: 'name', title: s.name, cell: (x) => <Link to={vmachinePath(x.id)}>{x.name}</Link> },
          { key: 'power', title: s.power, cell: (x) => <State value={x.template ? 'template' : x.power} /> },
          { key: 'size', title: storage.size, right: true, cell: (x) => <Bytes n={x.size} /> },
          { key: 'used', title: storage.used, right: true, cell: (x) => <Bytes n={x.used} /> },
          { key: 'disks', title: s.disks, right: true, sortable: false, cell: (x) => x.disks.length, csv: (x) => x.disks.length },
          { key: 'pmachine', title: s.hypervisor, cell: (x) => x.pmachine || storage.none },
          { key: 'host', title: s.host, cell: (x) => x.host || storage.none },
          { key: 'guest', title: s.guest, hidden: true, cell: (x) => x.guest ?? '' },
          { key: 'vcpus', title: s.cpus, hidden: true, right: true, cell: (x) => x.vcpus ?? '' },
          { key: 'memory', title: s.memory, hidden: true, right: true, cell: (x) => <Bytes n={x.memory} /> },
          { key: 'config', title: s.config, hidden: true, cell: (x) => <span className="varve-mono">{x.config}</span> },
          { key: 'modified', title: storage.modified, hidden: true, cell: (x) => <When at={x.modified} /> },
        ]}
        actions={(x) => [
          { title: s.snapshot, disabled: !may('createVMachineSnapshot'), onClick: (vm) => setDoing({ what: 'snapshot', vm }) },
          { title: s.clone, disabled: !may('cloneVMachine'), onClick: (vm) => setDoing({ what: 'clone', vm }) },
          { title: s.remove, danger: true, separated: true, disabled: !may('deleteVMachine') || !x.config, onClick: (vm) => setDoing({ what: 'delete', vm }) },
        ]}
        empty={{ title: s.empty, body: s.emptyBody, icon: VirtualMachineIcon, action: <Button variant="link" onClick={() => void go('/hypervisors')}>{s.toHypervisors}</Button> }} />
      {doing?.what === 'snapshot' && <TakeVMachineSnapshot vm={doing.vm} onClose={close} />}
      {doing?.what === 'clone' && <CloneVMachine vm={doing.vm} onClose={close} />}
      {doing?.what === 'delete' && <DeleteVMachine vm={doing.vm} onClose={close} onDeleted={() => undefined} />}
    </Page>
  );
}
