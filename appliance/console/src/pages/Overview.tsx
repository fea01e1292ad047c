// How it is: health with evidence and remedy, room, what is at stake, performance, and what to do next.
import { Alert, Button, Card, CardBody, CardTitle, Content, Progress, ProgressSize } from '@patternfly/react-core';
import { Table, Tbody, Td, Th, Thead, Tr } from '@patternfly/react-table';
import { useEffect, useState } from 'react';
import { Link, useLocation, useNavigate } from 'react-router';
import { useCall } from '../api/query';
import { useMay } from '../api/session';
import { useTasks } from '../shell/TaskDrawer';
import { operate } from '../strings/operate';
import { storage } from '../strings/storage';
import { Charts } from '../ui/Chart';
import { duration, number, percent, time } from '../ui/format';
import { vdiskPath, vpoolPath } from '../ui/names';
import { Loaded, Page } from '../ui/Page';
import { Bytes, LastKnown, State, When } from '../ui/State';
import { WhatIf } from './parts/WhatIf';

const s = operate.overview;

export default function Overview() {
  const status = useCall('getStatus', {}, { every: 10_000 });
  return (
    <Page title={s.title} operations={['getHealth', 'getStatus', 'listCapacity', 'listProtection', 'getCluster', 'listVDisks', 'listBackends', 'getHistory']}>
      <div className="varve-stack">
        <Health />
        <Figures />
        <div className="varve-grid varve-two">
          <Capacity />
          <Protection />
          <WhatIf />
        </div>
        {status.data && (
          <section aria-label={s.performance}>
            <Content component="h2">{s.performance}</Content>
            <Charts object={`node:${status.data.node}`} only={['read_iops', 'write_iops', 'read_bytes', 'write_bytes', 'read_p50', 'read_p99', 'write_p50', 'write_p99']} />
          </section>
        )}
      </div>
    </Page>
  );
}

function Health() {
  const health = useCall('getHealth', {}, { every: 10_000 });
  const [all, setAll] = useState(false);
  const { hash } = useLocation();
  useEffect(() => {
    if (hash === '#health') document.getElementById('health')?.scrollIntoView();
  }, [hash]);
  return (
    <Card id="health"><CardTitle component="h2">{s.health}</CardTitle><CardBody className="varve-stack">
      <Loaded query={health}>
        {(h) => {
          const bad = h.checks.filter((c) => c.state !== 'ok');
          const shown = all ? h.checks : bad;
          return (
            <>
              {h.unreachable.map((n) => <Alert key={n} isInline variant="warning" title={s.unreachable(n)} component="h3" />)}
              <div className="varve-row">
                <State value={h.state} /> <span>{bad.length === 0 ? s.allGood(h.checks.length) : s.uncleared(bad.length, h.checks.length)}</span>
                <span className="varve-dim">{s.checkedAt} <When at={h.at} /></span>
                <Button variant="link" isInline onClick={() => setAll(!all)}>{all ? s.hideAll : s.showAll}</Button>
              </div>
              {shown.length > 0 && (
                <Table variant="compact" aria-label={s.health} gridBreakPoint="grid-lg">
                  <Thead><Tr><Th>{s.state}</Th><Th>{s.check}</Th><Th>{s.where}</Th><Th>{s.evidence}</Th><Th>{s.remedy}</Th><Th>{s.since}</Th></Tr></Thead>
                  <Tbody>
                    {shown.map((c, i) => (
                      <Tr key={`${c.code} ${c.node} ${c.object ?? ''} ${i}`}>
                        <Td dataLabel={s.state}><State value={c.state} /></Td>
                        <Td dataLabel={s.check}>{c.title} <span className="varve-dim varve-mono">{c.code}</span></Td>
                        <Td dataLabel={s.where}>{c.object ?? c.node}</Td>
                        <Td dataLabel={s.evidence} modifier="breakWord">{c.evidence}</Td>
                        <Td dataLabel={s.remedy} modifier="breakWord">{c.remedy || '–'}</Td>
                        <Td dataLabel={s.since}><When at={c.since ?? c.at} /></Td>
                      </Tr>
                    ))}
                  </Tbody>
                </Table>
              )}
            </>
          );
        }}
      </Loaded>
    </CardBody></Card>
  );
}

function Figures() {
  const status = useCall('getStatus', {}, { every: 10_000 });
  const cluster = useCall('getCluster', {}, { every: 5_000 });
  const tasks = useTasks();
  const may = useMay();
  const go = useNavigate();
  const x = status.data;
  const log = x ? percent(x.log.used, x.log.capacity) : 0;
  const figure = (title: string, value: React.ReactNode, note?: React.ReactNode) => (
    <Card isCompact><CardTitle component="h2">{title}</CardTitle><CardBody><div className="varve-figure">{value}</div>{note}</CardBody></Card>
  );
  const reachable = cluster.data?.nodes.filter((n) => n.reachable).length ?? 0;
  return (
    <div className="varve-figures">
      {figure(s.vpools, <Link to="/vpools">{x?.vpools ?? '–'}</Link>)}
      {figure(s.vdisks, <Link to="/vdisks">{x ? number(x.vdisks) : '–'}</Link>,
        x && x.vdisks === 0 && may('createVDisk') && <Button variant="link" isInline onClick={() => void go('/vdisks')}>{s.nextVDisk}</Button>)}
      {figure(s.nodes, <Link to="/nodes">{cluster.data?.nodes.length ?? '–'}</Link>, cluster.data && (
        <span className="varve-dim">{s.nodesOf(reachable, cluster.data.nodes.length)} · {s.leader}: {cluster.data.leader || '–'}</span>))}
      {figure(s.log, `${log} %`, <Progress size={ProgressSize.sm} value={log} aria-label={s.log} measureLocation="none" {...(log > 80 ? { variant: 'warning' as const } : {})} />)}
      {figure(s.tasks, <Link to="/tasks">{tasks.filter((t) => t.state === 'running' || t.state === 'queued').length}</Link>)}
    </div>
  );
}

function Capacity() {
  const capacity = useCall('listCapacity', {}, { every: 30_000 });
  return (
    <Card><CardTitle component="h2">{s.capacity}</CardTitle><CardBody className="varve-stack">
      <Loaded query={capacity}>
        {(c) => c.items.map((p) => {
          const part = percent(p.total - p.free, p.total);
          return (
            <div key={p.id}>
              <div className="varve-row varve-ends"><Link to={vpoolPath(p.vpool)}>{p.vpool}</Link>{p.total > 0 && <span>{part} %</span>}</div>
              {p.total > 0 && (
                <Progress value={part} aria-label={p.vpool} measureLocation="none" size={ProgressSize.sm}
                  {...(part > 90 ? { variant: 'danger' as const } : part > 75 ? { variant: 'warning' as const } : {})} />
              )}
              <span className="varve-dim">{s.used} <Bytes n={p.used} /> · {p.total > 0 ? <>{s.free} <Bytes n={p.free} /></> : storage.noLimit} · {s.provisioned} <Bytes n={p.provisioned} />{p.total > 0 && <> · {p.full ? `${s.full} ${time(p.full)}` : s.never}</>}</span>
            </div>
          );
        })}
      </Loaded>
    </CardBody></Card>
  );
}

function Protection() {
  const protection = useCall('listProtection', { query: { limit: 8 } }, { every: 5_000 });
  return (
    <Card><CardTitle component="h2">{s.protection}</CardTitle><CardBody className="varve-stack">
      <Loaded query={protection}>
        {(list) => {
          const at = list.items.filter((p) => p.unbacked > 0 || p.unlogged > 0 || !p.known);
          if (at.length === 0) return <Content component="p"><State value="ok" /> {s.protectionNone}</Content>;
          return (
            <>
              <Content component="p" className="varve-dim">{s.protectionHelp}</Content>
              <ul className="varve-list">
                {at.map((p) => (
                  <li key={p.id}><Link to={vdiskPath(p.vdisk)}>{p.vdisk}</Link>: <Bytes n={p.unbacked} />, {s.oldest} {duration(p.unbacked_age)}
                    {p.unlogged > 0 && <> (<Bytes n={p.unlogged} /> {s.unlogged})</>} {!p.known && <State value="unknown" text={s.unknownValue} />} <LastKnown at={p.as_of} /></li>
                ))}
              </ul>
            </>
          );
        }}
      </Loaded>
    </CardBody></Card>
  );
}
