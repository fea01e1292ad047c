// Templates, and vDisks made from one.
import { Button, List, ListItem } from '@patternfly/react-core';
import { CopyIcon } from '@patternfly/react-icons';
import { useState } from 'react';
import { Link, useNavigate } from 'react-router';
import { call } from '../api/call';
import type { ItemOf } from '../api/call';
import { useRefresh } from '../api/query';
import { useMay } from '../api/session';
import { storage } from '../strings/storage';
import { FormDialog } from '../ui/dialog';
import { TextField } from '../ui/fields';
import { splitName } from '../ui/format';
import { vdiskPath } from '../ui/names';
import { ObjectTable } from '../ui/ObjectTable';
import { Page } from '../ui/Page';
import { Bytes, When } from '../ui/State';
import { useToast } from '../ui/toast';

const s = storage.templates;
type Template = ItemOf<'listTemplates'>;
const countMax = 1000;
const namesAtOnce = 100;

export default function Templates() {
  const may = useMay();
  const go = useNavigate();
  const [from, setFrom] = useState<Template>();
  return (
    <Page title={s.title} lead={s.lead} operations={['listTemplates', 'createFromTemplate', 'setTemplate']}>
      <ObjectTable id="templates" label={s.title} op="listTemplates" rowKey={(x: Template) => x.id} sort="name"
        columns={[
          { key: 'name', title: storage.name, cell: (x) => <Link to={vdiskPath(x.name)}>{x.name}</Link> },
          { key: 'size', title: storage.size, right: true, cell: (x) => <Bytes n={x.size} /> },
          { key: 'used', title: storage.used, right: true, cell: (x) => <Bytes n={x.used} /> },
          { key: 'created', title: storage.created, cell: (x) => <When at={x.created} /> },
        ]}
        actions={(x) => [{ title: s.create, disabled: !may('createFromTemplate'), onClick: () => setFrom(x) }]}
        empty={{ title: s.empty, body: s.emptyBody, icon: CopyIcon, action: <Button variant="link" onClick={() => void go('/vdisks')}>{s.toVDisks}</Button> }} />
      {from && <Copies from={from} onClose={() => setFrom(undefined)} />}
    </Page>
  );
}

function Copies({ from, onClose }: { from: Template; onClose: () => void }) {
  const { pool } = splitName(from.name);
  const [pattern, setPattern] = useState(`${pool}/vm#`);
  const [count, setCount] = useState('1');
  const [first, setFirst] = useState('1');
  const toast = useToast();
  const refresh = useRefresh();
  const n = /^\d+$/.test(count) ? Math.min(Number(count), countMax) : 0;
  const names = Array.from({ length: n }, (_, i) => (pattern.includes('#') ? pattern.replaceAll('#', String(Number(first) + i)) : n === 1 ? pattern : `${pattern}${Number(first) + i}`));
  return (
    <FormDialog title={s.createTitle(from.name)} submit={s.create} onClose={onClose} disabled={n < 1 || !splitName(pattern).path || !/^\d+$/.test(first)} onSubmit={async () => {
      // A task's arguments are bounded: many names are several tasks.
      for (let i = 0; i < names.length; i += namesAtOnce) await call('createFromTemplate', { path: { vdisk: from.name }, body: { names: names.slice(i, i + namesAtOnce) } });
      await refresh('listTasks', 'listVDisks');
      toast.done(s.started);
    }}>
      <TextField label={s.pattern} name="names" value={pattern} onChange={setPattern} required autoFocus mono help={s.patternHelp} />
      <TextField label={s.count} name="count" type="number" value={count} onChange={setCount} required />
      <TextField label={s.first} name="first" type="number" value={first} onChange={setFirst} />
      <div>
        <p className="varve-dim">{s.names}</p>
        <List className="varve-long">{names.slice(0, 5).map((x) => <ListItem key={x}>{x}</ListItem>)}{names.length > 5 && <ListItem>… {names[names.length - 1]}</ListItem>}</List>
      </div>
    </FormDialog>
  );
}
