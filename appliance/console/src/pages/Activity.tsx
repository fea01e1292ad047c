// What goes on and what has happened: tasks, events, the audit log.
import { Alert, Button, Content, Modal, ModalBody, ModalHeader, Progress } from '@patternfly/react-core';
import { ClipboardListIcon, ListIcon, TasksIcon } from '@patternfly/react-icons';
import { useState } from 'react';
import { call } from '../api/call';
import type { Answer, ItemOf } from '../api/call';
import { useCall, useRefresh } from '../api/query';
import { useMay } from '../api/session';
import { TaskFacts } from '../shell/TaskDrawer';
import { running } from '../strings/running';
import { duration, percent, time } from '../ui/format';
import { ObjectTable } from '../ui/ObjectTable';
import { Loaded, Page } from '../ui/Page';
import { State, When } from '../ui/State';
import { useToast } from '../ui/toast';
import { facts } from './parts/EventList';

type Task = ItemOf<'listTasks'>;

export function Tasks() {
  const s = running.tasks;
  const may = useMay();
  const toast = useToast();
  const refresh = useRefresh();
  const [shown, setShown] = useState('');
  const act = (op: 'cancelTask' | 'retryTask', x: Task, done: string) =>
    void call(op, { path: { task: x.id } }).then(() => { toast.done(done); void refresh('listTasks'); }, (e: unknown) => toast.failed(e));
  const over = (x: Task) => !['running', 'queued'].includes(x.state);
  return (
    <Page title={s.title} lead={s.lead} operations={['listTasks', 'getTask', 'cancelTask', 'retryTask']}>
      <ObjectTable id="tasks" label={s.title} op="listTasks" rowKey={(x: Task) => x.id} search="type" searchLabel={s.filter} every={10_000}
        columns={[
          { key: 'title', title: s.task, cell: (x) => <Button variant="link" isInline onClick={() => setShown(x.id)}>{x.title}</Button> },
          { key: 'state', title: running.state, cell: (x) => <State value={x.state} /> }, { key: 'object', title: running.object, cell: (x) => x.object || '–' },
          { key: 'done', title: s.progress, cell: (x) => (x.state === 'running' && x.total > 0 ? <Progress size="sm" value={percent(x.done, x.total)} aria-label={x.title} /> : over(x) ? '–' : '…') },
          { key: 'by', title: s.by, hidden: true, cell: (x) => x.by }, { key: 'node', title: running.node, cell: (x) => x.node || '–' }, { key: 'created', title: s.started, cell: (x) => <When at={x.created} /> },
          { key: 'ended', title: s.took, sortable: false, whole: true, cell: (x) => (x.started && x.ended ? duration((Date.parse(x.ended) - Date.parse(x.started)) / 1000) : '–') },
          { key: 'type', title: running.type, hidden: true, cell: (x) => x.type }, { key: 'id', title: 'Id', hidden: true, cell: (x) => x.id },
        ]}
        facets={[{ key: 'state', title: running.state, options: s.states }]}
        actions={(x) => [
          { title: s.details, onClick: () => setShown(x.id) }, { title: s.cancel, disabled: !x.can_cancel || !may('cancelTask'), onClick: () => act('cancelTask', x, s.cancelled) },
          { title: s.retry, disabled: !['failed', 'cancelled'].includes(x.state) || !may('retryTask'), onClick: () => act('retryTask', x, s.retried) },
        ]}
        empty={{ title: s.empty, body: s.emptyBody, icon: TasksIcon }} />
      {shown && <OneTask id={shown} onClose={() => setShown('')} />}
    </Page>
  );
}

function OneTask({ id, onClose }: { id: string; onClose: () => void }) {
  const query = useCall('getTask', { path: { task: id } }, { every: 5_000 });
  const s = running.tasks;
  return (
    <Modal isOpen variant="medium" onClose={onClose} aria-labelledby="task-title">
      <ModalHeader title={query.data?.title ?? s.task} labelId="task-title" />
      <ModalBody>
        <Loaded query={query}>
          {(x) => (
            <div className="varve-stack">
              <div><State value={x.state} /></div>
              <TaskFacts task={x} all />
              {x.log.length > 0 && <Content component="h3">{s.log}</Content>}
              {x.log.map((l, i) => <div key={i} className="varve-code">{time(l.at)} {l.text}</div>)}
              {x.result !== undefined && x.result !== null && <div className="varve-code">{JSON.stringify(x.result)}</div>}
              <span className="varve-dim varve-mono">{x.id}</span>
            </div>
          )}
        </Loaded>
      </ModalBody>
    </Modal>
  );
}

type Event = ItemOf<'listEvents'>;

export function Events() {
  const s = running.events;
  return (
    <Page title={s.title} lead={s.lead} operations={['listEvents', 'streamEvents']}>
      <ObjectTable id="events" label={s.title} op="listEvents" rowKey={(x: Event) => String(x.seq)} search="type" searchLabel={s.filter}
        columns={[
          { key: 'at', title: running.time, cell: (x) => <When at={x.at} exact /> }, { key: 'type', title: s.what, cell: (x) => x.type.replaceAll('_', ' ') }, { key: 'topic', title: s.topic, cell: (x) => x.topic },
          { key: 'data', title: s.data, sortable: false, cell: (x) => <span className="varve-code">{facts(x.data)}</span>, csv: (x) => JSON.stringify(x.data) },
          { key: 'key', title: running.object, hidden: true, cell: (x) => x.key ?? '' }, { key: 'seq', title: s.seq, hidden: true, cell: (x) => x.seq }, { key: 'node', title: running.node, hidden: true, cell: (x) => x.node ?? '' },
        ]}
        facets={[{ key: 'topic', title: s.topic, options: s.topics }]} empty={{ title: s.empty, body: s.emptyBody, icon: ListIcon }} />
    </Page>
  );
}

type Entry = ItemOf<'listAudit'>;

export function Audit() {
  const s = running.audit;
  const toast = useToast();
  const [found, setFound] = useState<Answer<'verifyAudit'>>();
  const verify = () => void call('verifyAudit').then(setFound, (e: unknown) => toast.failed(e));
  const save = () => void call('exportAudit').then((text) => {
    const a = document.createElement('a');
    a.href = URL.createObjectURL(new Blob([text as unknown as string], { type: 'application/x-ndjson' }));
    a.download = `audit-${new Date().toISOString().slice(0, 10)}.jsonl`;
    a.click();
    setTimeout(() => URL.revokeObjectURL(a.href), 10_000);
  }, (e: unknown) => toast.failed(e));
  return (
    <Page title={s.title} lead={s.lead} operations={['listAudit', 'verifyAudit', 'exportAudit']}
      actions={<><Button variant="secondary" onClick={verify}>{s.verify}</Button><Button variant="secondary" onClick={save}>{s.export}</Button></>}>
      {found && (
        <Alert isInline isLiveRegion variant={found.intact ? 'success' : 'danger'} title={found.intact ? s.intact(found.entries) : s.broken(found.broken_at ?? 0)} component="h2">
          {s.head} <span className="varve-code">{found.head}</span>
        </Alert>
      )}
      <ObjectTable id="audit" label={s.title} op="listAudit" rowKey={(x: Entry) => String(x.seq)} search="who" searchLabel={s.filter} sort="-seq"
        columns={[
          { key: 'seq', title: '#', cell: (x) => x.seq }, { key: 'time', title: running.time, cell: (x) => <When at={x.time} exact /> }, { key: 'who', title: s.who, cell: (x) => x.who }, { key: 'action', title: s.action, whole: true, cell: (x) => x.action },
          { key: 'object', title: running.object, cell: (x) => x.object }, { key: 'result', title: s.result, cell: (x) => <State value={x.result === 'ok' ? 'ok' : 'warning'} text={x.result} /> },
          { key: 'via', title: s.via, hidden: true, cell: (x) => x.via }, { key: 'from', title: s.from, cell: (x) => x.from }, { key: 'detail', title: s.detail, hidden: true, cell: (x) => x.detail ?? '' },
          { key: 'request_id', title: s.request, hidden: true, cell: (x) => <span className="varve-mono">{x.request_id}</span> },
        ]}
        facets={[{ key: 'via', title: s.via, options: s.vias }]} empty={{ title: s.empty, body: s.emptyBody, icon: ClipboardListIcon }} />
    </Page>
  );
}
