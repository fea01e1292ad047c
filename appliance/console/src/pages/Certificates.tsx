// The nodes' certificates: until when, and what renews them.
import { Alert, Button, Card, CardBody, CardTitle, Content } from '@patternfly/react-core';
import { Table, Tbody, Td, Th, Thead, Tr } from '@patternfly/react-table';
import { Link } from 'react-router';
import { call } from '../api/call';
import { useCall, useRefresh } from '../api/query';
import { useMay } from '../api/session';
import { care } from '../strings/care';
import { Facts } from '../ui/Facts';
import { nodePath } from '../ui/names';
import { Loaded, Page } from '../ui/Page';
import { State, When } from '../ui/State';
import { useToast } from '../ui/toast';

const s = care.certificates;
const soon = 7 * 86_400_000;
const schedule = 'certificates';

function ended(expires: string | undefined, reachable: boolean): [string, string] {
  if (!expires || expires.startsWith('0001-')) return ['unknown', reachable ? s.untold : s.unknown];
  const left = Date.parse(expires) - Date.now();
  return left < 0 ? ['error', s.over] : left < soon ? ['warning', s.soon] : ['ok', s.ok];
}

export default function Certificates() {
  const cluster = useCall('getCluster', {}, { every: 30_000 });
  const schedules = useCall('listSchedules', { query: { filter: `name="${schedule}"` } });
  const may = useMay();
  const toast = useToast();
  const refresh = useRefresh();
  const renewal = schedules.data?.items[0];
  const renew = () => void call('runSchedule', { path: { schedule }, query: { scope: renewal?.scope ?? 'cluster' } }).then(
    () => { toast.done(s.renewing); void refresh('listTasks', 'listSchedules'); }, (e: unknown) => toast.failed(e));
  return (
    <Page title={s.title} lead={s.lead} operations={['getCluster', 'listSchedules', 'runSchedule']}
      actions={may('runSchedule') && renewal && <Button variant="secondary" onClick={renew}>{s.renew}</Button>}>
      <div className="varve-stack">
        {renewal && !renewal.enabled && <Alert isInline variant="warning" title={s.off} component="h2" />}
        <Card><CardTitle component="h2">{s.of}</CardTitle><CardBody>
          <Loaded query={cluster}>
            {(c) => (
              <Table variant="compact" aria-label={s.of} gridBreakPoint="grid-md">
                <Thead><Tr><Th>{s.node}</Th><Th>{s.state}</Th><Th>{s.ends}</Th></Tr></Thead>
                <Tbody>
                  {c.nodes.map((n) => {
                    const [state, text] = ended(n.certificate_expires, n.reachable);
                    return (
                      <Tr key={n.id}>
                        <Td dataLabel={s.node}><Link to={nodePath(n.name)}>{n.name}</Link></Td>
                        <Td dataLabel={s.state}><State value={state} text={text} /></Td>
                        <Td dataLabel={s.ends}><When at={n.certificate_expires} exact /></Td>
                      </Tr>
                    );
                  })}
                </Tbody>
              </Table>
            )}
          </Loaded>
        </CardBody></Card>
        <div className="varve-grid">
          <Card><CardTitle component="h2">{s.renewal}</CardTitle><CardBody>
            <Facts items={[[s.name, <Link to="/schedules">{schedule}</Link>], [s.next, renewal?.enabled ? <When at={renewal.next} /> : '–'], [s.last, <When at={renewal?.last} />]]} />
          </CardBody></Card>
          <Card><CardTitle component="h2">{s.browser}</CardTitle><CardBody><Content component="p">{s.browserBody}</Content></CardBody></Card>
        </div>
      </div>
    </Page>
  );
}
