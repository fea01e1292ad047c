// Deleted vDisks that can be had back.
import { TrashIcon } from '@patternfly/react-icons';
import { useState } from 'react';
import { call } from '../api/call';
import type { ItemOf } from '../api/call';
import { useRefresh } from '../api/query';
import { useMay } from '../api/session';
import { running } from '../strings/running';
import { Destroy, FormDialog } from '../ui/dialog';
import { TextField } from '../ui/fields';
import { ObjectTable } from '../ui/ObjectTable';
import { Page } from '../ui/Page';
import { Bytes, When } from '../ui/State';
import { useToast } from '../ui/toast';

const s = running.trash;
type Trashed = ItemOf<'listTrash'>;

export default function Trash() {
  const may = useMay();
  const toast = useToast();
  const refresh = useRefresh();
  const [restoring, setRestoring] = useState<Trashed>();
  const [purging, setPurging] = useState<Trashed>();
  return (
    <Page title={s.title} lead={s.lead} operations={['listTrash', 'restoreTrash', 'purgeTrash']}>
      <ObjectTable id="trash" label={s.title} op="listTrash" rowKey={(x: Trashed) => x.id} sort="-removed"
        columns={[
          { key: 'name', title: running.name, cell: (x) => x.name }, { key: 'size', title: s.size, right: true, cell: (x) => <Bytes n={x.size} /> },
          { key: 'removed', title: s.removed, cell: (x) => <When at={x.removed} /> }, { key: 'until', title: s.until, cell: (x) => <When at={x.until} /> },
        ]}
        actions={(x) => [
          { title: s.restore, disabled: !may('restoreTrash'), onClick: () => setRestoring(x) },
          { title: s.purge, danger: true, separated: true, disabled: !may('purgeTrash'), onClick: () => setPurging(x) },
        ]}
        empty={{ title: s.empty, body: s.emptyBody, icon: TrashIcon }} />
      {restoring && <Restore item={restoring} onClose={() => setRestoring(undefined)} />}
      {purging && (
        <Destroy title={s.purgeTitle(purging.name)} verb={s.purge} op="purgeTrash" args={{ path: { volume: purging.id } }} onClose={() => setPurging(undefined)}
          onDone={() => { toast.done(s.purged(purging.name)); void refresh('listTrash'); }} />
      )}
    </Page>
  );
}

function Restore({ item, onClose }: { item: Trashed; onClose: () => void }) {
  const [name, setName] = useState(item.name);
  const toast = useToast();
  const refresh = useRefresh();
  return (
    <FormDialog title={`${s.restore} ${item.name}`} submit={s.restore} onClose={onClose} disabled={!name} onSubmit={async () => {
      await call('restoreTrash', { path: { volume: item.id }, body: name === item.name ? {} : { name } });
      await refresh('listTrash', 'listVDisks');
      toast.done(s.restored(name));
    }}>
      <TextField label={s.restoreAs} name="name" value={name} onChange={setName} required autoFocus mono help={s.nameHelp} />
    </FormDialog>
  );
}
