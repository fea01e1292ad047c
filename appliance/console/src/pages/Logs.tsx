// The logs of all nodes.
import { Alert, Button, Content, Form } from '@patternfly/react-core';
import { Table, Tbody, Td, Th, Thead, Tr } from '@patternfly/react-table';
import { useState } from 'react';
import { useCall } from '../api/query';
import { logs as s } from '../strings/logs';
import { SelectField, TextField } from '../ui/fields';
import { Loaded, Page } from '../ui/Page';
import { State, When } from '../ui/State';

const levels = ['debug', 'info', 'warn', 'error'];
const linesMax = 500;

export default function Logs() {
  const nodes = useCall('listNodes');
  const [level, setLevel] = useState('warn');
  const [node, setNode] = useState('');
  const [match, setMatch] = useState('');
  const [hours, setHours] = useState('1');
  const [asked, setAsked] = useState({ level, node, match, since: Math.floor(Date.now() / 1000) - 3600 });
  const query = useCall('queryLogs', { query: { ...asked, limit: linesMax } }, { keep: true });
  const save = () => {
    const a = document.createElement('a');
    a.href = URL.createObjectURL(new Blob((query.data?.items ?? []).map((l) => `${JSON.stringify(l)}\n`), { type: 'application/x-ndjson' }));
    a.download = 'logs.jsonl';
    a.click();
    setTimeout(() => URL.revokeObjectURL(a.href), 10_000);
  };
  return (
    <Page title={s.title} lead={s.lead} actions={<Button variant="secondary" onClick={save}>{s.save}</Button>} operations={['queryLogs']}>
      <Form className="varve-fields" onSubmit={(e) => { e.preventDefault(); setAsked({ level, node, match, since: Math.floor(Date.now() / 1000) - Number(hours) * 3600 }); }}>
        <SelectField label={s.level} name="level" value={level} onChange={setLevel} options={levels.map((l) => [l, l])} />
        <SelectField label={s.node} name="node" value={node} onChange={setNode} options={[['', s.all], ...(nodes.data?.items ?? []).map((n) => [n.name, n.name] as [string, string])]} />
        <SelectField label={s.since} name="since" value={hours} onChange={setHours} options={s.hours} />
        <TextField label={s.match} name="match" value={match} onChange={setMatch} help={s.matchHelp} />
        <div className="varve-go"><Button type="submit">{s.read}</Button></div>
      </Form>
      <Loaded query={query}>
        {(l) => (
          <>
            {l.unreachable.map((n) => <Alert key={n} isInline variant="warning" title={s.unreachable(n)} component="h2" />)}
            {l.items.length === 0 ? <Content component="p">{s.none}</Content> : (
              <Table variant="compact" aria-label={s.title} gridBreakPoint="grid-lg">
                <Thead><Tr><Th>{s.time}</Th><Th>{s.levelOf}</Th><Th>{s.node}</Th><Th>{s.component}</Th><Th>{s.message}</Th></Tr></Thead>
                <Tbody>
                  {[...l.items].reverse().map((x) => (
                    <Tr key={`${x.node} ${x.unit} ${x.seq}`}>
                      <Td dataLabel={s.time}><When at={x.at} exact /></Td><Td dataLabel={s.levelOf}><State value={x.level.toLowerCase() === 'warn' ? 'warning' : x.level.toLowerCase()} text={x.level} /></Td><Td dataLabel={s.node}>{x.node}</Td>
                      <Td dataLabel={s.component} modifier="breakWord"><span className="varve-mono">{x.component ?? x.unit}</span></Td>
                      <Td dataLabel={s.message} modifier="breakWord">{x.message} <span className="varve-code varve-dim">{Object.entries(x.attrs ?? {}).map(([k, v]) => `${k}=${v}`).join(' ')}</span></Td>
                    </Tr>
                  ))}
                </Tbody>
              </Table>
            )}
          </>
        )}
      </Loaded>
    </Page>
  );
}
