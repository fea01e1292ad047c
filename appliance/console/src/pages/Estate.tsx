// The appliances: nodes, their disks, backends, failure domains.
import { Alert, Button, Card, CardBody, ClipboardCopy, Content } from '@patternfly/react-core';
import { HddIcon, ServerIcon, SitemapIcon, StorageDomainIcon } from '@patternfly/react-icons';
import { useState } from 'react';
import { Link, useNavigate, useParams } from 'react-router';
import { call } from '../api/call';
import type { Answer, ItemOf } from '../api/call';
import { useCall, useRefresh } from '../api/query';
import { useMay } from '../api/session';
import { t } from '../strings';
import { running } from '../strings/running';
import { Charts } from '../ui/Chart';
import { Destroy, FormDialog, stay } from '../ui/dialog';
import { CheckField, SelectField, TextField } from '../ui/fields';
import { Facts } from '../ui/Facts';
import { nodePath, vpoolPath } from '../ui/names';
import { ObjectTable } from '../ui/ObjectTable';
import { Loaded, Page } from '../ui/Page';
import { Bytes, LastKnown, State, When } from '../ui/State';
import { URLTabs } from '../ui/URLTabs';
import { useToast } from '../ui/toast';

type Node = ItemOf<'listNodes'>;
type Disk = ItemOf<'listDisks'>;
type Backend = ItemOf<'listBackends'>;
type Domain = ItemOf<'listDomains'>;

/** How the cluster sees a node: what the table of nodes does not say. */
function useSeen() {
  const cluster = useCall('getCluster', {}, { every: 3_000 });
  return { cluster, seen: (id: string) => cluster.data?.nodes.find((n) => n.id === id) };
}

function nodeState(n: Node, seen: ReturnType<ReturnType<typeof useSeen>['seen']>): string {
  if (n.offline) return 'offline';
  return seen?.reachable === false ? 'unreachable' : 'online';
}

/** A node that answers is seen now; of another one, when its last word was written down. */
function Seen({ node, reachable }: { node: Node; reachable: boolean | undefined }) {
  return reachable && !node.offline ? <>{running.nodes.seenNow}</> : <When at={node.seen} />;
}

function useNodeChange() {
  const toast = useToast();
  const refresh = useRefresh();
  return (n: Node, body: { role?: string; offline?: boolean }) => void call('patchNode', { path: { node: n.name }, rev: n.rev, body }).then(
    () => { toast.done(running.nodes.done(n.name)); void refresh('listNodes', 'getNode', 'getCluster'); }, (e: unknown) => toast.failed(e));
}

export function Nodes() {
  const s = running.nodes;
  const may = useMay();
  const { cluster, seen } = useSeen();
  const change = useNodeChange();
  const [adding, setAdding] = useState(false);
  const [removing, setRemoving] = useState<Node>();
  return (
    <Page title={s.title} lead={s.lead} actions={may('createJoinToken') && <Button onClick={() => setAdding(true)}>{s.add}</Button>} operations={['listNodes', 'getCluster', 'createJoinToken', 'patchNode', 'removeNode']}>
      {(cluster.data?.problems ?? []).map((p) => <Alert key={p} isInline variant="warning" title={p} component="h2" />)}
      <ObjectTable id="nodes" label={s.title} op="listNodes" rowKey={(x: Node) => x.id} sort="name" every={5_000}
        columns={[
          { key: 'name', title: running.name, cell: (x) => <><Link to={nodePath(x.name)}>{x.name}</Link> {x.self && <span className="varve-dim">({s.self})</span>}</> },
          { key: 'offline', title: running.state, cell: (x) => { const v = nodeState(x, seen(x.id)); return <State value={v} />; } },
          { key: 'role', title: s.role, cell: (x) => <>{x.role} {seen(x.id)?.leader && <State value="info" text={s.leader} />}</> }, { key: 'nfs', title: s.nfs, cell: (x) => <span className="varve-mono">{x.nfs ?? ''}</span> },
          { key: 'https', title: s.https, hidden: true, cell: (x) => <span className="varve-mono">{x.https ?? ''}</span> }, { key: 'nbd', title: s.nbd, hidden: true, cell: (x) => <span className="varve-mono">{x.nbd ?? ''}</span> },
          { key: 'version', title: s.version, cell: (x) => x.version }, { key: 'seen', title: s.seen, cell: (x) => <Seen node={x} reachable={seen(x.id)?.reachable} /> }, { key: 'joined', title: s.joined, hidden: true, cell: (x) => <When at={x.joined} /> },
        ]}
        actions={(x) => [
          { title: x.role === 'master' ? s.demote : s.promote, disabled: !may('patchNode'), onClick: () => change(x, { role: x.role === 'master' ? 'extra' : 'master' }) },
          { title: x.offline ? s.markOnline : s.markOffline, disabled: !may('patchNode'), onClick: () => change(x, { offline: !x.offline }) },
          { title: s.remove, danger: true, separated: true, disabled: !may('removeNode'), onClick: () => setRemoving(x) },
        ]}
        empty={{ title: s.empty, body: '', icon: ServerIcon }} />
      {adding && <AddNode onClose={() => setAdding(false)} />}
      {removing && <RemoveNode node={removing} onClose={() => setRemoving(undefined)} />}
    </Page>
  );
}

function AddNode({ onClose }: { onClose: () => void }) {
  const s = running.nodes;
  const [role, setRole] = useState('master');
  const [token, setToken] = useState<Answer<'createJoinToken'>>();
  return (
    <FormDialog title={s.add} description={s.tokenLead} submit={token ? t.close : s.tokenMake} onClose={onClose} onSubmit={async () => {
      if (token) return undefined;
      setToken(await call('createJoinToken', { body: { role, ttl: 3600 } }));
      return stay;
    }}>
      {token ? (
        <div className="varve-stack">
          <Content component="p">{s.tokenWizard}</Content>
          <ClipboardCopy isReadOnly isCode textAriaLabel={s.token} hoverTip={t.copy} clickTip={t.copied}>{token.token}</ClipboardCopy>
          <Content component="p">{s.tokenLine}</Content>
          <ClipboardCopy isReadOnly isCode textAriaLabel={s.tokenLine} hoverTip={t.copy} clickTip={t.copied}>{`varve cluster join ${token.token}`}</ClipboardCopy>
          <Content component="p">{running.oncely} {s.expires}: <When at={token.expires} exact /></Content>
          <Content component="p">{s.tokenThen}</Content>
        </div>
      ) : <SelectField label={s.tokenRole} name="role" value={role} onChange={setRole} options={[['master', s.master], ['extra', s.extra]]} />}
    </FormDialog>
  );
}

function RemoveNode({ node, onClose, onRemoved }: { node: Node; onClose: () => void; onRemoved?: () => void }) {
  const s = running.nodes;
  const [force, setForce] = useState(false);
  const toast = useToast();
  const refresh = useRefresh();
  return (
    <Destroy title={s.removeTitle(node.name)} verb={s.remove} op="removeNode" args={{ path: { node: node.name }, rev: node.rev, query: force ? { force } : {} }} onClose={onClose}
      onDone={() => { toast.done(s.removed(node.name)); void refresh('listNodes', 'getCluster'); onRemoved?.(); }}>
      <CheckField label={s.force} name="force" value={force} onChange={setForce} />
    </Destroy>
  );
}

export function NodePage() {
  const s = running.nodes;
  const { node = '' } = useParams();
  const query = useCall('getNode', { path: { node } }, { every: 10_000 });
  const { seen } = useSeen();
  const may = useMay();
  const go = useNavigate();
  const [removing, setRemoving] = useState(false);
  return (
    <Page title={node} trail={[[s.title, '/nodes']]} label={query.data && <State value={nodeState(query.data, seen(query.data.id))} />} names={{ node }}
      actions={may('removeNode') && <Button variant="secondary" isDanger onClick={() => setRemoving(true)}>{s.remove}</Button>} operations={['getNode', 'patchNode', 'removeNode', 'listDisks', 'getHistory']}>
      <Loaded query={query}>
        {(x) => {
          const c = seen(x.id);
          return (
            <URLTabs label={node} tabs={[
              ['overview', s.overview, () => (
                <Card><CardBody>
                  <Facts items={[
                    [s.role, x.role], [s.voter, c?.voter ? running.yes : running.no], [s.leader, c?.leader ? running.yes : running.no], [s.lag, c?.lag ?? '–'], [s.version, x.version], [s.seen, <Seen node={x} reachable={c?.reachable} />], [s.joined, <When at={x.joined} exact />],
                    [s.https, <span className="varve-mono">{x.https}</span>], [s.nfs, <span className="varve-mono">{x.nfs}</span>], [s.nbd, <span className="varve-mono">{x.nbd}</span>], [s.address, <span className="varve-mono">{c?.peer ?? '–'}</span>],
                    [s.certificate, c?.certificate_expires ? <When at={c.certificate_expires} /> : '–'], [s.id, <span className="varve-mono">{x.id}</span>],
                  ]} />
                </CardBody></Card>
              )],
              ['disks', s.disks, () => <DiskTable node={x.name} />],
              ['performance', s.performance, () => <Charts object={`node:${x.name}`} />],
            ]} />
          );
        }}
      </Loaded>
      {query.data && removing && <RemoveNode node={query.data} onClose={() => setRemoving(false)} onRemoved={() => void go('/nodes')} />}
    </Page>
  );
}

function DiskTable({ node }: { node?: string }) {
  const s = running.disks;
  return (
    <ObjectTable id="disks" label={s.title} op="listDisks" {...(node ? { args: { query: { filter: `node="${node}"` } } } : {})} rowKey={(x: Disk) => x.id} search="device" searchLabel={s.filter} every={30_000}
      columns={[
        { key: 'device', title: s.device, cell: (x) => <span className="varve-mono">{x.device}</span> }, ...(node ? [] : [{ key: 'node', title: running.node, cell: (x: Disk) => <Link to={nodePath(x.node)}>{x.node}</Link> }]),
        { key: 'state', title: running.state, cell: (x) => <><State value={x.state} /> <LastKnown at={x.as_of} /></> }, { key: 'kind', title: s.kind, cell: (x) => x.kind }, { key: 'model', title: s.model, hidden: true, cell: (x) => x.model ?? '' }, { key: 'serial', title: s.serial, hidden: true, cell: (x) => x.serial ?? '' },
        { key: 'size', title: s.size, right: true, cell: (x) => <Bytes n={x.size} /> }, { key: 'used', title: s.used, right: true, cell: (x) => <Bytes n={x.used} /> }, { key: 'free', title: s.free, right: true, hidden: true, cell: (x) => <Bytes n={x.free} /> },
        { key: 'roles', title: s.roles, cell: (x) => x.roles.join(', ') || running.none }, { key: 'mounts', title: s.mounts, hidden: true, cell: (x) => x.mounts?.join(', ') ?? '' },
      ]}
      empty={{ title: s.empty, body: s.emptyBody, icon: HddIcon }} />
  );
}

export function Disks() {
  const s = running.disks;
  return <Page title={s.title} lead={s.lead} operations={['listDisks']}><DiskTable /></Page>;
}

export function Backends() {
  const s = running.backends;
  const may = useMay();
  const toast = useToast();
  const test = (b: Backend) => void call('testBackend', { path: { vpool: b.vpool } }).then(
    (r) => (r.ok ? toast.done(s.ok(b.vpool, r.duration_ms)) : toast.failed(new Error(r.error ?? ''), b.vpool)), (e: unknown) => toast.failed(e));
  return (
    <Page title={s.title} lead={s.lead} operations={['listBackends', 'getBackend', 'testBackend']}>
      <ObjectTable id="backends" label={s.title} op="listBackends" rowKey={(x: Backend) => x.id} search="vpool" searchLabel={s.filter} every={15_000}
        columns={[
          { key: 'vpool', title: s.vpool, cell: (x) => <Link to={`${vpoolPath(x.vpool)}?tab=settings`}>{x.vpool}</Link> }, { key: 'state', title: running.state, cell: (x) => <><State value={x.state} /> <LastKnown at={x.as_of} /></> }, { key: 'kind', title: s.kind, hidden: true, cell: (x) => x.kind },
          { key: 'url', title: s.url, cell: (x) => <span className="varve-mono">{x.url}</span> }, { key: 'node', title: running.node, hidden: true, cell: (x) => x.node ?? '' }, { key: 'stored', title: s.stored, right: true, hidden: true, cell: (x) => (x.stored > 0 ? <Bytes n={x.stored} /> : '–') },
          { key: 'pending', title: s.pending, right: true, cell: (x) => <Bytes n={x.pending} /> }, { key: 'free', title: s.free, right: true, cell: (x) => (x.total > 0 ? <Bytes n={x.free} /> : '–') }, { key: 'error', title: s.error, hidden: true, cell: (x) => x.error ?? '' },
        ]}
        actions={(x) => [{ title: s.test, disabled: !may('testBackend'), onClick: () => test(x) }]} empty={{ title: s.empty, body: s.emptyBody, icon: StorageDomainIcon }} />
    </Page>
  );
}

export function Domains() {
  const s = running.domains;
  const may = useMay();
  const toast = useToast();
  const refresh = useRefresh();
  const [doing, setDoing] = useState<{ what: 'create' } | { what: 'edit' | 'delete'; domain: Domain }>();
  const create = may('createDomain') && <Button onClick={() => setDoing({ what: 'create' })}>{s.create}</Button>;
  const close = () => setDoing(undefined);
  return (
    <Page title={s.title} lead={s.lead} actions={create} operations={['listDomains', 'createDomain', 'patchDomain', 'deleteDomain']}>
      <ObjectTable id="domains" label={s.title} op="listDomains" rowKey={(x: Domain) => x.id} sort="name"
        columns={[{ key: 'name', title: running.name, cell: (x) => x.name }, { key: 'created', title: running.created, cell: (x) => <When at={x.created} /> }]}
        actions={(x) => [
          { title: running.edit, disabled: !may('patchDomain'), onClick: () => setDoing({ what: 'edit', domain: x }) },
          { title: running.delete, danger: true, separated: true, disabled: !may('deleteDomain'), onClick: () => setDoing({ what: 'delete', domain: x }) },
        ]}
        empty={{ title: s.empty, body: s.emptyBody, action: create, icon: SitemapIcon }} />
      {doing && doing.what !== 'delete' && <DomainDialog {...(doing.what === 'edit' ? { domain: doing.domain } : {})} onClose={close} />}
      {doing?.what === 'delete' && (
        <Destroy title={running.deleteTitle(doing.domain.name)} verb={t.remove} op="deleteDomain" args={{ path: { domain: doing.domain.name }, rev: doing.domain.rev }} onClose={close}
          onDone={() => { toast.done(running.deleted(doing.domain.name)); void refresh('listDomains'); }} />
      )}
    </Page>
  );
}

function DomainDialog({ domain, onClose }: { domain?: Domain; onClose: () => void }) {
  const [name, setName] = useState(domain?.name ?? '');
  const refresh = useRefresh();
  return (
    <FormDialog title={running.domains.create} submit={domain ? t.save : t.create} onClose={onClose} disabled={!name} onSubmit={async () => {
      if (domain) await call('patchDomain', { path: { domain: domain.name }, rev: domain.rev, body: { name } });
      else await call('createDomain', { body: { name } });
      await refresh('listDomains');
    }}>
      <TextField label={running.name} name="name" value={name} onChange={setName} required autoFocus />
    </FormDialog>
  );
}
