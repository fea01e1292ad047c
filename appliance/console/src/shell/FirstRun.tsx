// The first run: from the set-up code to a mounted datastore. What has been done is on the appliance, so the wizard goes on after a reload at the
// step that is still open; once it is finished, or put off, it is not shown again.
import {
  Alert, Button, Card, CardBody, Content, Form, PageSection, ProgressStep, ProgressStepper, Radio, Title,
} from '@patternfly/react-core';
import { CheckCircleIcon } from '@patternfly/react-icons';
import { Table, Tbody, Td, Th, Thead, Tr } from '@patternfly/react-table';
import { Suspense, lazy, useEffect, useRef, useState } from 'react';
import type { FormEvent, ReactNode } from 'react';
import { useNavigate } from 'react-router';
import { call } from '../api/call';
import { useCall, useRefresh } from '../api/query';
import { useSession } from '../api/session';
import { operate } from '../strings/operate';
import { t } from '../strings';
import { FieldErrors, TextField } from '../ui/fields';
import { duration } from '../ui/format';
import { fieldErrors } from '../ui/dialog';
import { JoinForm, Joined } from './Join';
import type { JoinedCluster } from './Join';
import { Loaded } from '../ui/Page';
import { ProblemAlert } from '../ui/Problem';
import { Bytes } from '../ui/State';
import { useVPoolForm } from '../ui/vpoolForm';
import { Facts } from '../ui/Facts';

const Mount = lazy(() => import('../pages/parts/Mount').then((m) => ({ default: m.Mount })));

const s = operate.first;
const steps = ['admin', 'facts', 'cluster', 'disks', 'vpool', 'mount', 'done'] as const;
type Step = (typeof steps)[number];

/** The setting that says how far the first run has come; "done" or none: it is not shown. */
export const firstRunKey = 'console.first-run';

export default function FirstRun() {
  const { state, forget } = useSession();
  const [step, setStep] = useState<Step>();
  const saved = useCall('listConfig', { query: { filter: `key="${firstRunKey}"` } }, { enabled: state === 'in' });
  const [joined, setJoined] = useState<JoinedCluster>();
  const [pool, setPool] = useState('');
  const go = useNavigate();
  const heading = useRef<HTMLHeadingElement>(null);
  const refresh = useRefresh();
  useEffect(() => void (document.title = `${s.title} · ${t.product}`), []);
  const reached = saved.data?.items[0]?.value as Step | undefined;
  const current: Step = state === 'setup' ? 'admin' : step ?? (reached && steps.includes(reached) && reached !== 'admin' ? reached : 'facts');
  const at = steps.indexOf(current);

  const whenJoined = (j: JoinedCluster) => {
    setJoined(j);
    forget(); // the session has ended with the cluster of one
    requestAnimationFrame(() => heading.current?.focus());
  };
  const to = (next: Step) => {
    setStep(next);
    void call('setConfig', { path: { key: firstRunKey }, rev: 0, body: { value: next } }).then(() => refresh('getConfig', 'listConfig'), () => undefined);
    requestAnimationFrame(() => heading.current?.focus());
  };
  const finish = () => {
    to('done');
    void go('/');
  };
  const buttons = (next: Step, ready = true, label = s.next) => (
    <div className="varve-row">
      <Button onClick={() => to(next)} isDisabled={!ready}>{label}</Button>
      {at > 1 && <Button variant="secondary" onClick={() => to(steps[at - 1]!)}>{s.back}</Button>}
      <Button variant="link" onClick={() => void go('/')}>{s.later}</Button>
    </div>
  );
  const bodies: Record<Step, ReactNode> = {
    admin: <First onDone={() => to('facts')} onJoined={whenJoined} />,
    facts: <><FactsStep />{buttons('cluster')}</>,
    cluster: <ClusterStep onJoined={whenJoined}>{(stay) => buttons('disks', stay)}</ClusterStep>,
    disks: <><Disks />{buttons('vpool')}</>,
    vpool: <FirstPool onDone={(name) => { setPool(name); to('mount'); }} buttons={(go2) => (
      <div className="varve-row">
        {go2}
        <Button variant="secondary" onClick={() => to('disks')}>{s.back}</Button>
        <Button variant="link" onClick={() => void go('/')}>{s.later}</Button>
      </div>
    )} />,
    mount: <MountStep pool={pool}>{buttons('done', true, s.next)}</MountStep>,
    done: (
      <>
        <Content component="p"><CheckCircleIcon /> {s.doneLead} {s.doneBody}</Content>
        <div><Button onClick={finish}>{s.toOverview}</Button></div>
      </>
    ),
  };
  if (joined) {
    return (
      <main className="varve-first">
        <PageSection>
          <span className="varve-brand"><img src="/favicon.svg" alt="" />{t.product}</span>
          <Title headingLevel="h1">{s.title}</Title>
        </PageSection>
        <PageSection>
          <Card isLarge><CardBody className="varve-stack">
            <h2 ref={heading} tabIndex={-1} className="varve-step">{s.steps.cluster}</h2>
            <Joined joined={joined} />
          </CardBody></Card>
        </PageSection>
      </main>
    );
  }
  return (
    <main className="varve-first">
      <PageSection>
        <span className="varve-brand"><img src="/favicon.svg" alt="" />{t.product}</span>
        <Title headingLevel="h1">{s.title}</Title>
        <ProgressStepper aria-label={s.title}>
          {steps.map((x, i) => (
            <ProgressStep key={x} id={`step-${x}`} titleId={`step-${x}-title`} variant={i < at ? 'success' : i === at ? 'info' : 'pending'} isCurrent={i === at} aria-label={s.steps[x]}>{s.steps[x]}</ProgressStep>
          ))}
        </ProgressStepper>
      </PageSection>
      <PageSection>
        <Card isLarge><CardBody className="varve-stack">
          <h2 ref={heading} tabIndex={-1} className="varve-step">{s.steps[current]}</h2>
          {bodies[current]}
        </CardBody></Card>
      </PageSection>
    </main>
  );
}

/** Before the appliance has an administrator: it gets one, or becomes a node of a cluster that has its own. */
function First({ onDone, onJoined }: { onDone: () => void; onJoined: (j: JoinedCluster) => void }) {
  const [join, setJoin] = useState(false);
  return (
    <>
      {join ? <JoinForm claimed={false} onJoined={onJoined} /> : <Admin onDone={onDone} />}
      <div><Button variant="link" isInline onClick={() => setJoin(!join)}>{join ? s.adminInstead : s.joinInstead}</Button></div>
    </>
  );
}

const passwordMin = 12;

function Admin({ onDone }: { onDone: () => void }) {
  const { opened } = useSession();
  const [code, setCode] = useState('');
  const [name, setName] = useState('admin');
  const [password, setPassword] = useState('');
  const [again, setAgain] = useState('');
  const [error, setError] = useState<unknown>();
  const [busy, setBusy] = useState(false);
  const ready = code && name && password.length >= passwordMin && password === again;
  const go = async (e: FormEvent) => {
    e.preventDefault();
    if (!ready || busy) return;
    setBusy(true);
    setError(undefined);
    try {
      const session = await call('setUp', { body: { code: code.trim(), name, password } });
      await opened(session);
      onDone();
    } catch (caught) {
      setError(caught);
      setBusy(false);
    }
  };
  return (
    <FieldErrors.Provider value={fieldErrors(error)}>
      <Form onSubmit={(e) => void go(e)} isWidthLimited>
        <Content component="p">{s.adminLead}</Content>
        {error !== undefined && <ProblemAlert error={error} focus />}
        <TextField label={s.code} name="code" value={code} onChange={setCode} required autoFocus mono help={s.codeHelp} />
        <TextField label={s.name} name="name" value={name} onChange={setName} required autoComplete="username" />
        <TextField label={s.password} name="password" type="password" value={password} onChange={setPassword} required autoComplete="new-password" help={s.passwordHelp}
          wrong={password && password.length < passwordMin ? s.short : undefined} />
        <TextField label={s.again} name="again" type="password" value={again} onChange={setAgain} required autoComplete="new-password" wrong={again && again !== password ? s.mismatch : undefined} />
        <div><Button type="submit" isLoading={busy} isDisabled={!ready || busy}>{s.create}</Button></div>
      </Form>
    </FieldErrors.Provider>
  );
}

const skewMax = 5;

function FactsStep() {
  const status = useCall('getStatus');
  const nodes = useCall('listNodes');
  const [skew, setSkew] = useState<number>();
  useEffect(() => {
    const sent = Date.now();
    void fetch('/api', { cache: 'no-store' }).then((r) => {
      const there = Date.parse(r.headers.get('Date') ?? '');
      if (!Number.isNaN(there)) setSkew(Math.abs(there + 500 - (sent + Date.now()) / 2) / 1000);
    }, () => undefined);
  }, []);
  return (
    <>
      <Content component="p">{s.factsLead}</Content>
      <Loaded query={status}>
        {(x) => {
          const self = nodes.data?.items.find((n) => n.self);
          return (
            <Facts items={[
              [s.node, x.node], [s.version, x.version], [s.component, <span className="varve-mono">{x.cluster.slice(0, 8)}.{x.node_id.slice(0, 8)}</span>],
              [s.addresses, <span className="varve-mono">{[self?.https, self?.nfs, self?.nbd].filter(Boolean).join('  ')}</span>],
              [s.data, x.services.map((v) => `${v.name} ${v.address}`).join(', ')],
              [s.clock, skew === undefined ? '–' : skew < skewMax ? s.clockGood(duration(Math.max(1, Math.round(skew)))) : s.clockBad(duration(skew))],
            ]} />
          );
        }}
      </Loaded>
      {skew !== undefined && skew >= skewMax && <Alert isInline variant="warning" title={s.clockBad(duration(skew))} component="h3" />}
    </>
  );
}

function ClusterStep({ children, onJoined }: { children: (stay: boolean) => ReactNode; onJoined: (j: JoinedCluster) => void }) {
  const [stay, setStay] = useState(true);
  return (
    <>
      <Content component="p">{s.clusterLead}</Content>
      <div role="radiogroup" aria-label={s.steps.cluster} className="varve-stack">
        <Radio id="cluster-new" name="cluster" label={s.clusterNew} isChecked={stay} onChange={() => setStay(true)} />
        <Radio id="cluster-join" name="cluster" label={s.clusterJoin} isChecked={!stay} onChange={() => setStay(false)} />
      </div>
      {!stay && <JoinForm claimed onJoined={onJoined} />}
      {children(stay)}
    </>
  );
}

function Disks() {
  const disks = useCall('listDisks');
  return (
    <>
      <Content component="p">{s.disksLead}</Content>
      <Loaded query={disks}>
        {(list) => (
          <Table variant="compact" aria-label={s.steps.disks} gridBreakPoint="grid-md">
            <Thead><Tr><Th>{s.disk}</Th><Th>{s.kind}</Th><Th>{s.size}</Th><Th>{s.roles}</Th></Tr></Thead>
            <Tbody>
              {list.items.map((d) => (
                <Tr key={d.id}><Td dataLabel={s.disk}><span className="varve-mono">{d.device} {d.model}</span></Td><Td dataLabel={s.kind}>{d.kind}</Td><Td dataLabel={s.size}><Bytes n={d.size} /></Td>
                  <Td dataLabel={s.roles}>{d.roles.join(', ') || s.unused}</Td></Tr>
              ))}
            </Tbody>
          </Table>
        )}
      </Loaded>
    </>
  );
}

function FirstPool({ onDone, buttons }: { onDone: (name: string) => void; buttons: (go: ReactNode) => ReactNode }) {
  const pools = useCall('listVPools');
  const form = useVPoolForm();
  const refresh = useRefresh();
  const [chosen, setChosen] = useState('');
  const [error, setError] = useState<unknown>();
  const [busy, setBusy] = useState(false);
  const there = pools.data?.items ?? [];
  const choice = chosen || there[0]?.name || 'new';
  const go = async () => {
    if (choice !== 'new') return onDone(choice);
    setBusy(true);
    setError(undefined);
    try {
      const made = await call('createVPool', { body: form.body });
      await refresh('listVPools');
      onDone(made.name);
    } catch (caught) {
      setError(caught);
      setBusy(false);
    }
  };
  return (
    <FieldErrors.Provider value={fieldErrors(error)}>
      <Content component="p">{s.vpoolLead}</Content>
      <div role="radiogroup" aria-label={s.steps.vpool} className="varve-stack">
        {there.map((p) => <Radio key={p.id} id={`pool-${p.name}`} name="pool" label={s.vpoolThere(p.name)} description={p.backend} isChecked={choice === p.name} onChange={() => setChosen(p.name)} />)}
        <Radio id="pool-new" name="pool" label={s.vpoolNew} isChecked={choice === 'new'} onChange={() => setChosen('new')} />
      </div>
      {choice === 'new' && <Form isWidthLimited>{error !== undefined && <ProblemAlert error={error} focus />}{form.fields}</Form>}
      {buttons(<Button onClick={() => void go()} isLoading={busy} isDisabled={busy || (choice === 'new' && !form.complete)}>{s.next}</Button>)}
    </FieldErrors.Provider>
  );
}

function MountStep({ pool, children }: { pool: string; children: ReactNode }) {
  const pools = useCall('listVPools');
  const name = pool || pools.data?.items[0]?.name;
  return (
    <>
      <Content component="p">{s.mountLead}</Content>
      {name && <Suspense fallback={null}><Mount vpool={name} /></Suspense>}
      {children}
    </>
  );
}
