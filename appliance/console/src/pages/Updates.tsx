// What the appliances run, the bundle that is here, and the rollout of it: a task of the cluster, so it is followed, paused and gone on with like
// any other.
import { Alert, Button, Card, CardBody, CardTitle, Content, FileUpload, Form, FormGroup, Progress } from '@patternfly/react-core';
import { Table, Tbody, Td, Th, Thead, Tr } from '@patternfly/react-table';
import { useEffect, useRef, useState } from 'react';
import type { FormEvent } from 'react';
import { Link } from 'react-router';
import { problemOf, upload } from '../api/call';
import type { Answer, ItemOf } from '../api/call';
import { useCall, useRefresh } from '../api/query';
import { useMay } from '../api/session';
import { TaskFacts } from '../shell/TaskDrawer';
import { t } from '../strings';
import { care } from '../strings/care';
import { Destroy } from '../ui/dialog';
import { CheckField } from '../ui/fields';
import { bytes, number, percent } from '../ui/format';
import { nodePath } from '../ui/names';
import { Loaded, Page } from '../ui/Page';
import { ProblemAlert } from '../ui/Problem';
import { Bytes, State, When } from '../ui/State';
import { useToast } from '../ui/toast';

const s = care.updates;
const shown = 10;
const every = 3_000;

type All = Answer<'getUpdates'>;
type Node = All['nodes'][number];
type Bundle = All['bundles'][number];

const active = (x: { state: string } | undefined) => x !== undefined && ['running', 'queued'].includes(x.state);

export default function Updates() {
  const may = useMay();
  const updates = useCall('getUpdates', {}, { every });
  const former = useCall('listTasks', { query: { filter: 'type="update.rollout"', limit: shown } }, { every: 15_000 });
  const [starting, setStarting] = useState<Bundle>();
  const [finalising, setFinalising] = useState(false);
  const toast = useToast();
  const refresh = useRefresh();
  const u = updates.data;
  const older = former.data?.items.filter((x) => x.id !== u?.rollout?.id) ?? [];
  return (
    <Page title={s.title} lead={s.lead} operations={['getUpdates', 'uploadUpdate', 'startRollout', 'finaliseUpdate', 'listTasks', 'cancelTask', 'retryTask']}>
      <div className="varve-stack">
        {u?.rollout && active(u.rollout) && <Card><CardTitle component="h2">{s.underWay}</CardTitle><CardBody><Rollout task={u.rollout} /></CardBody></Card>}
        <Card><CardTitle component="h2">{s.versions}</CardTitle><CardBody className="varve-stack">
          <Loaded query={updates}>
            {(x) => <><Same nodes={x.nodes} /><Nodes nodes={x.nodes} /><Level u={x} onFinalise={() => setFinalising(true)} /></>}
          </Loaded>
        </CardBody></Card>
        <Card><CardTitle component="h2">{s.bundles}</CardTitle><CardBody className="varve-stack">
          <Loaded query={updates}>
            {(x) => (x.bundles.length === 0 ? <Content component="p">{s.noBundle}</Content> : (
              <Bundles bundles={x.bundles} may={may('startRollout') && !active(x.rollout)} onStart={setStarting} />
            ))}
          </Loaded>
          {may('uploadUpdate') && u && <Upload disabled={active(u.rollout)} />}
        </CardBody></Card>
        <Card><CardTitle component="h2">{s.rollouts}</CardTitle><CardBody className="varve-stack">
          {u && !active(u.rollout) && u.rollout && <Rollout task={u.rollout} />}
          <Loaded query={former}>
            {() => (older.length === 0 && !u?.rollout ? <Content component="p">{s.empty}</Content> : older.map((x) => <Rollout key={x.id} task={x} />))}
          </Loaded>
        </CardBody></Card>
      </div>
      {starting && <Start bundle={starting} onClose={() => setStarting(undefined)} />}
      {finalising && (
        <Destroy title={s.finaliseTitle} verb={s.finalise} op="finaliseUpdate" args={{}} onClose={() => setFinalising(false)}
          onDone={() => { toast.done(s.finalised); void refresh('getUpdates'); }} />
      )}
    </Page>
  );
}

function Same({ nodes }: { nodes: Node[] }) {
  const versions = new Set(nodes.map((n) => n.version));
  return versions.size === 1 ? <Content component="p">{s.same([...versions][0]!)}</Content> : <Alert isInline variant="warning" title={s.mixed(versions.size)} component="h3" />;
}

function Nodes({ nodes }: { nodes: Node[] }) {
  return (
    <Table variant="compact" aria-label={s.versions} gridBreakPoint="grid-md">
      <Thead><Tr><Th>{s.node}</Th><Th>{s.version}</Th><Th>{s.state}</Th><Th modifier="wrap">{s.vdisks}</Th></Tr></Thead>
      <Tbody>
        {nodes.map((n) => (
          <Tr key={n.id}>
            <Td dataLabel={s.node}><Link to={nodePath(n.name)}>{n.name}</Link></Td>
            <Td dataLabel={s.version}><span className="varve-mono">{n.version}</span></Td>
            <Td dataLabel={s.state} modifier="breakWord"><NodeState n={n} /></Td>
            <Td dataLabel={s.vdisks}><Served node={n.name} /></Td>
          </Tr>
        ))}
      </Tbody>
    </Table>
  );
}

/** How a node is with respect to updates; of several things the one that matters most, and what went wrong last. */
function NodeState({ n }: { n: Node }) {
  const now = !n.reachable ? <State value="unreachable" /> : n.busy ? <State value="running" text={s.writing} /> : n.trying ? <State value="running" text={s.proving} />
    : !n.ready ? <State value="warning" text={s.notReady} /> : !n.updatable ? <State value="package" text={s.package} /> : <State value="ready" text={s.ready} />;
  return (
    <>
      {now}
      {n.busy && (n.total ?? 0) > 0 && <Progress size="sm" value={percent(n.done ?? 0, n.total ?? 0)} aria-label={`${s.writing}: ${n.name}`} />}
      {n.failed && <div>{s.wentBack(n.failed)} {n.failed_at && <When at={n.failed_at} />}{n.why && `: ${n.why}`}</div>}
      {n.error && n.reachable && <div>{n.error}</div>}
    </>
  );
}

/** Guests of a node wait while it restarts: those of the vDisks that it serves to a client now. */
function Served({ node }: { node: string }) {
  const open = useCall('listVDisks', { query: { filter: `owner="${node}" and clients>0`, limit: 1, count: true } }, { every: 30_000 });
  return <>{open.data ? open.data.count ? s.served(number(open.data.count)) : s.none : '…'}</>;
}

function Level({ u, onFinalise }: { u: All; onFinalise: () => void }) {
  const may = useMay();
  if (u.level_ready <= u.level) return <Content component="p" className="varve-dim">{s.level(u.level)}</Content>;
  return (
    <Alert isInline variant="info" title={s.levelReady(u.level_ready)} component="h3">
      <Content component="p">{s.levelBody}</Content>
      {may('finaliseUpdate') && <Button variant="secondary" onClick={onFinalise}>{s.finalise}</Button>}
    </Alert>
  );
}

function Bundles({ bundles, may, onStart }: { bundles: Bundle[]; may: boolean; onStart: (b: Bundle) => void }) {
  return (
    <Table variant="compact" aria-label={s.bundles} gridBreakPoint="grid-md">
      <Thead><Tr><Th>{s.version}</Th><Th>{s.built}</Th><Th>{s.size}</Th><Th>{s.on}</Th><Th>SHA-256</Th><Th screenReaderText={t.table.actions} /></Tr></Thead>
      <Tbody>
        {bundles.map((b) => (
          <Tr key={`${b.node} ${b.sha256}`}>
            <Td dataLabel={s.version}><span className="varve-mono">{b.version}</span></Td>
            <Td dataLabel={s.built}><When at={b.built} exact /></Td>
            <Td dataLabel={s.size}><Bytes n={b.size} /></Td>
            <Td dataLabel={s.on}><Link to={nodePath(b.node)}>{b.node}</Link></Td>
            <Td dataLabel="SHA-256"><span className="varve-mono" title={b.sha256}>{b.sha256.slice(0, 12)}…</span></Td>
            <Td>{may && <Button size="sm" onClick={() => onStart(b)}>{s.start}</Button>}</Td>
          </Tr>
        ))}
      </Tbody>
    </Table>
  );
}

function Start({ bundle, onClose }: { bundle: Bundle; onClose: () => void }) {
  const [finalise, setFinalise] = useState(false);
  const toast = useToast();
  const refresh = useRefresh();
  return (
    <Destroy title={s.startTitle(bundle.version)} verb={s.startVerb} op="startRollout" args={{ body: { sha256: bundle.sha256, ...(finalise ? { finalise } : {}) } }} onClose={onClose}
      onDone={() => { toast.done(s.started); void refresh('getUpdates', 'listTasks'); }}>
      <Content component="p">{s.startBody}</Content>
      <CheckField label={s.andFinalise} help={s.levelBody} name="finalise" value={finalise} onChange={setFinalise} />
    </Destroy>
  );
}

/** Gives a bundle to this appliance, which checks it as it arrives. */
function Upload({ disabled }: { disabled: boolean }) {
  const [file, setFile] = useState<File>();
  const [sent, setSent] = useState<number>();
  const [error, setError] = useState<unknown>();
  const stop = useRef<AbortController>(undefined);
  const toast = useToast();
  const refresh = useRefresh();
  useEffect(() => () => stop.current?.abort(), []);
  const busy = sent !== undefined;
  const go = async (e: FormEvent) => {
    e.preventDefault();
    if (!file || busy) return;
    setError(undefined);
    setSent(0);
    stop.current = new AbortController();
    try {
      const b = await upload('uploadUpdate', file, setSent, stop.current.signal);
      toast.done(s.uploaded(b.version));
      setFile(undefined);
    } catch (caught) {
      if (!stop.current.signal.aborted) setError(caught);
    }
    setSent(undefined);
    void refresh('getUpdates');
  };
  return (
    <Form onSubmit={(e) => void go(e)} isWidthLimited>
      {error !== undefined && <ProblemAlert error={error} focus {...(problemOf(error).code === 'unreachable' ? { title: s.broken } : {})} />}
      <FormGroup label={s.file} fieldId="bundle">
        <FileUpload id="bundle" filename={file ? `${file.name} (${bytes(file.size)})` : ''} filenamePlaceholder={s.filePlaceholder} onFileInputChange={(_, f) => setFile(f)}
          onClearClick={() => setFile(undefined)} hideDefaultPreview browseButtonText={s.choose} isDisabled={busy || disabled} aria-label={s.file} />
        {disabled && <Content component="p" className="varve-dim">{s.notNow}</Content>}
      </FormGroup>
      {busy && file && <Progress value={percent(sent, file.size)} title={sent < file.size ? s.sending : s.checking} size="sm" />}
      <div className="varve-row">
        <Button type="submit" variant="secondary" isLoading={busy} isDisabled={!file || busy || disabled}>{s.upload}</Button>
        {busy && <Button variant="link" onClick={() => stop.current?.abort()}>{t.cancel}</Button>}
      </div>
    </Form>
  );
}

function Rollout({ task }: { task: ItemOf<'listTasks'> }) {
  return (
    <section aria-label={task.title} className="varve-stack">
      <div className="varve-row"><State value={task.state} /> <When at={task.created} exact /></div>
      <TaskFacts task={task} all words={{ cancel: s.pause, again: s.goOn }} />
    </section>
  );
}
