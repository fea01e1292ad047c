// How a host mounts a vPool, as the appliance says, and the proof from both ends that it did.
import { Alert, Button, ClipboardCopy, ClipboardCopyVariant, Content, Form, List, ListItem } from '@patternfly/react-core';
import { CheckCircleIcon, ExclamationCircleIcon } from '@patternfly/react-icons';
import { useState } from 'react';
import { call } from '../../api/call';
import type { Answer } from '../../api/call';
import { useCall } from '../../api/query';
import { useMay } from '../../api/session';
import { operate } from '../../strings/operate';
import { SelectField, TextField } from '../../ui/fields';
import { duration } from '../../ui/format';
import { Loaded } from '../../ui/Page';
import { ProblemAlert } from '../../ui/Problem';

const s = operate.mount;
const waitSeconds = 120;

export function Mount({ vpool }: { vpool: string }) {
  const [target, setTarget] = useState('esxi');
  const [address, setAddress] = useState(location.hostname);
  const help = useCall('getMountHelp', { path: { vpool }, query: { for: target, address } }, { keep: true });
  const download = (text: string) => {
    const a = document.createElement('a');
    a.href = URL.createObjectURL(new Blob([text], { type: 'text/plain' }));
    a.download = `mount-${vpool}-${target}.txt`;
    a.click();
    setTimeout(() => URL.revokeObjectURL(a.href), 10_000);
  };
  return (
    <div className="varve-stack">
      <Content component="p">{s.lead}</Content>
      <Form isWidthLimited>
        <SelectField label={s.target} name="target" value={target} onChange={setTarget} options={Object.entries(s.targets)} />
        <TextField label={s.server} name="address" value={address} onChange={setAddress} mono help={s.serverHelp} />
      </Form>
      <Loaded query={help}>
        {(h) => (
          <>
            {(h.problems ?? []).map((p) => <Alert key={p} isInline variant="warning" title={p} component="h3" />)}
            {h.steps.map((x) => (
              <div key={x.title}>
                <Content component="p">{x.title} {x.where && <span className="varve-dim">{x.where}</span>}</Content>
                <ClipboardCopy isCode isReadOnly hoverTip={s.copy} clickTip={s.copied} textAriaLabel={x.title} toggleAriaLabel={x.title} isExpanded={x.command.includes('\n')}
                  variant={x.command.includes('\n') ? ClipboardCopyVariant.expansion : ClipboardCopyVariant.inline}>{x.command}</ClipboardCopy>
              </div>
            ))}
            <div><Button variant="link" isInline onClick={() => download(h.script)}>{s.download}</Button></div>
            <List>{h.notes.map((n) => <ListItem key={n}>{n}</ListItem>)}</List>
          </>
        )}
      </Loaded>
      <Proof vpool={vpool} />
    </div>
  );
}

/** Has the appliance mount the vPool itself, and then wait for a host that mounts it and writes. */
function Proof({ vpool }: { vpool: string }) {
  const may = useMay();
  const [host, setHost] = useState('');
  const [busy, setBusy] = useState(false);
  const [result, setResult] = useState<Answer<'testMount'>>();
  const [error, setError] = useState<unknown>();
  const test = () => {
    setBusy(true);
    setResult(undefined);
    setError(undefined);
    call('testMount', { path: { vpool }, body: host ? { host, seconds: waitSeconds } : {} }).then(setResult, setError).finally(() => setBusy(false));
  };
  if (!may('testMount')) return null;
  return (
    <section className="varve-stack" aria-label={s.proof}>
      <Content component="h3">{s.proof}</Content>
      <Content component="p">{s.proofLead}</Content>
      <Form isWidthLimited onSubmit={(e) => { e.preventDefault(); test(); }}>
        <TextField label={s.host} name="host" value={host} onChange={setHost} mono help={s.hostHelp} />
        <div className="varve-row">
          <Button type="submit" variant="secondary" isLoading={busy} isDisabled={busy}>{s.test}</Button>
          {busy && host && <span role="status">{s.waiting(duration(waitSeconds))}</span>}
        </div>
      </Form>
      {error !== undefined && <ProblemAlert error={error} focus />}
      {result && (
        <Alert isInline isLiveRegion variant={result.ok ? 'success' : 'danger'} title={result.ok ? s.good : s.bad} component="h3">
          <List isPlain>
            {result.checks.map((c) => (
              <ListItem key={c.name} icon={c.ok ? <CheckCircleIcon /> : <ExclamationCircleIcon />}>
                {c.name}: {c.detail} <span className="varve-dim">{duration(c.ms / 1000)}</span> {c.remedy && <strong>{c.remedy}</strong>}
              </ListItem>
            ))}
          </List>
        </Alert>
      )}
    </section>
  );
}
