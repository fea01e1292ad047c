// All vPools, and making one.
import { Button } from '@patternfly/react-core';
import { StorageDomainIcon } from '@patternfly/react-icons';
import { useState } from 'react';
import { Link, useNavigate } from 'react-router';
import { call } from '../api/call';
import type { ItemOf } from '../api/call';
import { useCall, useRefresh } from '../api/query';
import { useMay } from '../api/session';
import { t } from '../strings';
import { storage } from '../strings/storage';
import { Destroy, FormDialog } from '../ui/dialog';
import { number } from '../ui/format';
import { vpoolPath } from '../ui/names';
import { ObjectTable } from '../ui/ObjectTable';
import { Page } from '../ui/Page';
import { Bytes, Free, LastKnown, State, When } from '../ui/State';
import { useToast } from '../ui/toast';
import { useVPoolForm } from '../ui/vpoolForm';

const s = storage.vpools;
type VPool = ItemOf<'listVPools'>;

export default function VPools() {
  const may = useMay();
  const go = useNavigate();
  const toast = useToast();
  const refresh = useRefresh();
  const [creating, setCreating] = useState(false);
  const [deleting, setDeleting] = useState<VPool>();
  // What the vDisks hold; the backend itself is not asked how much of it is taken.
  const capacity = useCall('listCapacity', { query: { limit: 1000 } }, { every: 30_000 });
  const used = (p: VPool) => capacity.data?.items.find((c) => c.id === p.id)?.used;
  const create = may('createVPool') && <Button onClick={() => setCreating(true)}>{s.create}</Button>;
  return (
    <Page title={s.title} lead={s.lead} actions={create} operations={['listVPools', 'listCapacity', 'createVPool', 'deleteVPool']}>
      <ObjectTable id="vpools" label={s.title} op="listVPools" rowKey={(p: VPool) => p.id} every={15_000} sort="name"
        columns={[
          { key: 'name', title: storage.name, cell: (p) => <Link to={vpoolPath(p.name)}>{p.name}</Link> },
          { key: 'backend', title: storage.backend, cell: (p) => <span className="varve-mono">{p.backend}</span> },
          { key: 'vdisks', title: s.vdisks, right: true, cell: (p) => number(p.vdisks) },
          { key: 'files', title: s.files, right: true, hidden: true, cell: (p) => number(p.files) },
          { key: 'stored', title: storage.used, right: true, sortable: false, cell: (p) => <Bytes n={used(p)} />, csv: used },
          { key: 'free', title: storage.free, right: true, cell: (p) => <><Free p={p} /> <LastKnown at={p.as_of} /></> },
          { key: 'total', title: storage.total, right: true, hidden: true, cell: (p) => (p.total > 0 ? <Bytes n={p.total} /> : storage.noLimit) },
          { key: 'class', title: s.durability, cell: (p) => <State value={p.class} /> },
          { key: 'encrypted', title: s.encrypted, hidden: true, cell: (p) => (p.encrypted ? storage.yes : storage.no) },
          { key: 'created', title: storage.created, hidden: true, cell: (p) => <When at={p.created} /> },
        ]}
        actions={(p) => [
          { title: s.mount, onClick: () => void go(`${vpoolPath(p.name)}?tab=hosts`) },
          { title: s.delete, danger: true, separated: true, disabled: !may('deleteVPool'), onClick: () => setDeleting(p) },
        ]}
        empty={{ title: s.empty, body: s.emptyBody, action: create, icon: StorageDomainIcon }} />
      {creating && <CreateVPool onClose={() => setCreating(false)} onMade={(name) => void go(vpoolPath(name))} />}
      {deleting && (
        <Destroy title={s.deleteTitle(deleting.name)} verb={t.remove} op="deleteVPool" args={{ path: { vpool: deleting.name }, rev: deleting.rev }}
          onDone={() => { toast.done(s.deleted(deleting.name)); void refresh('listVPools'); }} onClose={() => setDeleting(undefined)} />
      )}
    </Page>
  );
}

function CreateVPool({ onClose, onMade }: { onClose: () => void; onMade: (name: string) => void }) {
  const form = useVPoolForm();
  const toast = useToast();
  const refresh = useRefresh();
  return (
    <FormDialog wide title={s.createTitle} description={s.probing} submit={t.create} onClose={onClose} disabled={!form.complete}
      onSubmit={async () => {
        const made = await call('createVPool', { body: form.body });
        await refresh('listVPools');
        toast.done(s.made(made.name));
        onMade(made.name);
      }}>
      {form.fields}
    </FormDialog>
  );
}
