// What the appliances run, and how updates of the cluster went. An update is a task of the cluster, so it is followed, stopped and gone on with
// like any other.
import { Alert, Card, CardBody, CardTitle, ClipboardCopy, Content } from '@patternfly/react-core';
import { Table, Tbody, Td, Th, Thead, Tr } from '@patternfly/react-table';
import { Link } from 'react-router';
import type { ItemOf } from '../api/call';
import { useCall } from '../api/query';
import { TaskFacts } from '../shell/TaskDrawer';
import { t } from '../strings';
import { care } from '../strings/care';
import { number } from '../ui/format';
import { nodePath } from '../ui/names';
import { Loaded, Page } from '../ui/Page';
import { State, When } from '../ui/State';

const s = care.updates;
const shown = 10;

export default function Updates() {
  const nodes = useCall('listNodes', { query: { sort: 'name', limit: 1000 } }, { every: 5_000 });
  const rollouts = useCall('listTasks', { query: { filter: 'type="update.rollout"', limit: shown } }, { every: 5_000 });
  return (
    <Page title={s.title} lead={s.lead} operations={['listNodes', 'listTasks', 'cancelTask', 'retryTask', 'listVDisks']}>
      <div className="varve-stack">
        <Card><CardTitle component="h2">{s.versions}</CardTitle><CardBody className="varve-stack">
          <Loaded query={nodes}>
            {(list) => {
              const versions = new Set(list.items.map((n) => n.version));
              return (
                <>
                  {versions.size === 1 ? <Content component="p">{s.same([...versions][0]!)}</Content> : <Alert isInline variant="warning" title={s.mixed(versions.size)} component="h3" />}
                  <Table variant="compact" aria-label={s.versions} gridBreakPoint="grid-md">
                    <Thead><Tr><Th>{s.node}</Th><Th>{s.version}</Th><Th>{s.vdisks}</Th></Tr></Thead>
                    <Tbody>
                      {list.items.map((n) => (
                        <Tr key={n.id}>
                          <Td dataLabel={s.node}><Link to={nodePath(n.name)}>{n.name}</Link></Td>
                          <Td dataLabel={s.version}><span className="varve-mono">{n.version}</span></Td>
                          <Td dataLabel={s.vdisks}><Served node={n.name} /></Td>
                        </Tr>
                      ))}
                    </Tbody>
                  </Table>
                </>
              );
            }}
          </Loaded>
        </CardBody></Card>
        <Card><CardTitle component="h2">{s.rollouts}</CardTitle><CardBody className="varve-stack">
          <Loaded query={rollouts}>
            {(list) => (list.items.length === 0 ? <Content component="p">{s.empty}</Content> : list.items.map((x) => <Rollout key={x.id} task={x} />))}
          </Loaded>
        </CardBody></Card>
        <Card><CardTitle component="h2">{s.start}</CardTitle><CardBody className="varve-stack">
          <Content component="p">{s.startBody}</Content>
          {[s.verify, s.command].map((line) => <ClipboardCopy key={line} isReadOnly isCode textAriaLabel={line} hoverTip={t.copy} clickTip={t.copied}>{line}</ClipboardCopy>)}
          <Content component="p" className="varve-dim">{s.stop}</Content>
        </CardBody></Card>
      </div>
    </Page>
  );
}

function Rollout({ task }: { task: ItemOf<'listTasks'> }) {
  return (
    <section aria-label={task.title} className="varve-stack">
      <div className="varve-row"><State value={task.state} /> <When at={task.created} exact /></div>
      <TaskFacts task={task} all />
    </section>
  );
}

/** Guests of a node wait while it restarts: those of the vDisks that it serves to a client now. */
function Served({ node }: { node: string }) {
  const open = useCall('listVDisks', { query: { filter: `owner="${node}" and clients>0`, limit: 1, count: true } }, { every: 30_000 });
  return <>{open.data ? open.data.count ? s.served(number(open.data.count)) : s.none : '…'}</>;
}
