// One VM: what it is, its disks, its snapshots.
import { Alert, Button, Card, CardBody, CardTitle } from '@patternfly/react-core';
import { CameraIcon } from '@patternfly/react-icons';
import { Table, Tbody, Td, Th, Thead, Tr } from '@patternfly/react-table';
import { useState } from 'react';
import { Link, useNavigate, useParams } from 'react-router';
import type { Answer, ItemOf } from '../api/call';
import { useCall } from '../api/query';
import { useMay } from '../api/session';
import { machines } from '../strings/machines';
import { storage } from '../strings/storage';
import { ActionMenu } from '../ui/ActionMenu';
import type { MenuAction } from '../ui/ActionMenu';
import { Facts } from '../ui/Facts';
import { hypervisorPath, vdiskPath } from '../ui/names';
import { ObjectTable } from '../ui/ObjectTable';
import { Loaded, Page } from '../ui/Page';
import { Bytes, State, When } from '../ui/State';
import { URLTabs } from '../ui/URLTabs';
import { EventList } from './parts/EventList';
import { CloneVMachine, DeleteVMachine, DeleteVMachineSnapshot, RollBackVMachine, TakeVMachineSnapshot, VMachineTemplate } from './parts/VMachineDialogs';

const s = machines.vmachines;
const sn = machines.snapshots;
type VMachine = Answer<'getVMachine'>;
type Snapshot = ItemOf<'listVMachineSnapshots'>;
type Dialog = '' | 'snapshot' | 'clone' | 'template' | 'delete';

export default function VMachinePage() {
  const { vmachine = '' } = useParams();
  const query = useCall('getVMachine', { path: { vmachine } }, { every: 10_000 });
  const may = useMay();
  const go = useNavigate();
  const [dialog, setDialog] = useState<Dialog>('');
  const close = () => setDialog('');
  const vm = query.data;
  const to = (d: Dialog) => () => setDialog(d);
  const more: MenuAction[] = vm ? [
    { title: s.clone, disabled: !may('cloneVMachine'), onClick: to('clone') }, { title: vm.template ? s.makeVM : s.makeTemplate, disabled: !may('setVMachineTemplate'), onClick: to('template') },
    { title: s.remove, disabled: !may('deleteVMachine') || vm.config === '', danger: true, separated: true, onClick: to('delete') },
  ] : [];
  return (
    <Page title={vm?.name ?? vmachine} trail={[[s.title, '/vmachines']]} label={vm && <State value={vm.template ? 'template' : vm.power} />} names={{ vmachine: vm?.name ?? vmachine }}
      operations={['getVMachine', 'listVMachineSnapshots', 'getVMachineSnapshot', 'createVMachineSnapshot', 'deleteVMachineSnapshot', 'rollbackVMachine', 'cloneVMachine', 'setVMachineTemplate', 'deleteVMachine']}
      actions={vm && (
        <>
          {may('createVMachineSnapshot') && <Button onClick={() => setDialog('snapshot')}>{s.snapshot}</Button>}
          <ActionMenu label={storage.actions} actions={more} />
        </>
      )}>
      <Loaded query={query}>
        {(x) => (
          <URLTabs label={x.name} tabs={[
            ['overview', s.overview, () => <Overview vm={x} />],
            ['snapshots', s.snapshots, () => <Snapshots vm={x} />],
            ['events', s.events, () => <EventList objectKey={x.id} />],
          ]} />
        )}
      </Loaded>
      {vm && dialog === 'snapshot' && <TakeVMachineSnapshot vm={vm} onClose={close} />}
      {vm && dialog === 'clone' && <CloneVMachine vm={vm} onClose={close} />}
      {vm && dialog === 'template' && <VMachineTemplate vm={vm} onClose={close} />}
      {vm && dialog === 'delete' && <DeleteVMachine vm={vm} onClose={close} onDeleted={() => void go('/vmachines')} />}
    </Page>
  );
}

function Overview({ vm }: { vm: VMachine }) {
  return (
    <div className="varve-stack">
      {vm.problem && <Alert isInline variant="warning" component="h2" title={s.problem}>{vm.problem}</Alert>}
      {vm.layered && <Alert isInline variant="info" component="h2" title={s.layered}>{s.layeredBody}</Alert>}
      <Card><CardTitle component="h2">{s.overview}</CardTitle><CardBody>
        <Facts items={[
          [storage.size, <Bytes n={vm.size} />], [storage.used, <Bytes n={vm.used} />], [s.hypervisor, vm.pmachine ? <Link to={hypervisorPath(vm.pmachine)}>{vm.pmachine}</Link> : storage.none], [s.host, vm.host || storage.none],
          [s.guest, vm.guest || s.unknown], [s.cpus, vm.vcpus || s.unknown], [s.memory, vm.memory ? <Bytes n={vm.memory} /> : s.unknown], [s.clients, vm.clients],
          [s.config, <span className="varve-mono">{vm.config || storage.none}</span>], [s.format, vm.format], [s.uuid, <span className="varve-mono">{vm.uuid || storage.none}</span>], [storage.created, <When at={vm.created} exact />],
        ]} />
      </CardBody></Card>
      <Card><CardTitle component="h2">{s.disks}</CardTitle><CardBody>
        <Table aria-label={s.disks} variant="compact">
          <Thead><Tr><Th>{s.label}</Th><Th>{s.vdisk}</Th><Th>{storage.size}</Th><Th>{storage.used}</Th></Tr></Thead>
          <Tbody>
            {vm.disks.map((d) => (
              <Tr key={d.label + d.file}>
                <Td dataLabel={s.label}>{d.label}</Td>
                <Td dataLabel={s.vdisk}>{d.vdisk ? <Link to={vdiskPath(d.vdisk)}>{d.vdisk}</Link> : <span className="varve-dim">{d.file} ({s.nowhere})</span>}</Td>
                <Td dataLabel={storage.size}><Bytes n={d.size} /></Td>
                <Td dataLabel={storage.used}><Bytes n={d.used} /></Td>
              </Tr>
            ))}
          </Tbody>
        </Table>
      </CardBody></Card>
    </div>
  );
}

function Snapshots({ vm }: { vm: VMachine }) {
  const may = useMay();
  const [doing, setDoing] = useState<{ what: 'take' } | { what: 'rollback' | 'clone' | 'delete'; snapshot: Snapshot }>();
  const close = () => setDoing(undefined);
  const take = may('createVMachineSnapshot') && <Button variant="secondary" onClick={() => setDoing({ what: 'take' })}>{sn.take}</Button>;
  return (
    <>
      <ObjectTable id="vmachine-snapshots" label={s.snapshots} op="listVMachineSnapshots" args={{ path: { vmachine: vm.id } }} rowKey={(x: Snapshot) => x.id} sort="-created" tools={take}
        columns={[
          { key: 'name', title: sn.name, cell: (x) => x.name },
          { key: 'created', title: sn.created, cell: (x) => <When at={x.created} exact /> },
          { key: 'automatic', title: sn.kind, cell: (x) => (x.automatic ? sn.automatic : sn.manual) },
          { key: 'complete', title: sn.complete, cell: (x) => sn.of(x.disks, x.of) },
          { key: 'sticky', title: sn.kept, cell: (x) => (x.sticky ? sn.yes : sn.no) },
          { key: 'consistent', title: sn.consistent, hidden: true, cell: (x) => (x.consistent ? sn.yes : sn.no) },
          { key: 'backed', title: sn.backed, cell: (x) => (x.backed ? sn.yes : sn.no) },
          { key: 'clones', title: sn.clones, right: true, cell: (x) => x.clones },
        ]}
        actions={() => [
          { title: sn.rollback, disabled: !may('rollbackVMachine'), onClick: (snapshot) => setDoing({ what: 'rollback', snapshot }) },
          { title: s.clone, disabled: !may('cloneVMachine'), onClick: (snapshot) => setDoing({ what: 'clone', snapshot }) },
          { title: sn.remove, danger: true, separated: true, disabled: !may('deleteVMachineSnapshot'), onClick: (snapshot) => setDoing({ what: 'delete', snapshot }) },
        ]}
        empty={{ title: sn.empty, body: sn.emptyBody, action: take, icon: CameraIcon }} />
      {doing?.what === 'take' && <TakeVMachineSnapshot vm={vm} onClose={close} />}
      {doing?.what === 'rollback' && <RollBackVMachine vm={vm} snapshot={doing.snapshot} onClose={close} />}
      {doing?.what === 'clone' && <CloneVMachine vm={vm} snapshot={doing.snapshot.id} onClose={close} />}
      {doing?.what === 'delete' && <DeleteVMachineSnapshot vm={vm} snapshot={doing.snapshot} onClose={close} />}
    </>
  );
}
