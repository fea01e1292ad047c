// Long work: what runs, what has ended lately, with steps, progress, and its end said aloud. It is read from the server, so a reload shows the same.
import {
  Button, EmptyState, EmptyStateBody, NotificationDrawer, NotificationDrawerBody, NotificationDrawerHeader, NotificationDrawerList, NotificationDrawerListItem,
  NotificationDrawerListItemBody, NotificationDrawerListItemHeader, Progress, ProgressStep, ProgressStepper,
} from '@patternfly/react-core';
import { useEffect, useMemo, useRef } from 'react';
import { Link } from 'react-router';
import { call } from '../api/call';
import type { ItemOf } from '../api/call';
import { useCall, useRefresh } from '../api/query';
import { useMay, useSession } from '../api/session';
import { t } from '../strings';
import { ago, duration, percent } from '../ui/format';
import { useToast } from '../ui/toast';

export type Task = ItemOf<'listTasks'>;

const recentTasks = 30;

/** The newest tasks, and all that run, newest first. */
export function useTasks(): Task[] {
  const may = useMay();
  const running = useCall('listTasks', { query: { filter: 'state=running or state=queued', limit: 100 } }, { enabled: may('listTasks') });
  const recent = useCall('listTasks', { query: { limit: recentTasks } }, { enabled: may('listTasks') });
  return useMemo(() => {
    const all = new Map<string, Task>();
    for (const x of [...(running.data?.items ?? []), ...(recent.data?.items ?? [])]) all.set(x.id, x);
    return [...all.values()].sort((a, b) => b.created.localeCompare(a.created));
  }, [running.data, recent.data]);
}

const over = (x: Task) => !['running', 'queued'].includes(x.state);

export function TaskDrawer({ onClose }: { onClose: () => void }) {
  const tasks = useTasks();
  const { session } = useSession();
  const toast = useToast();
  const seen = useRef<Map<string, string>>(new Map());
  useEffect(() => {
    for (const x of tasks) {
      const before = seen.current.get(x.id);
      seen.current.set(x.id, x.state);
      if (before && before !== x.state && over(x) && x.by === `user/${session?.name}`) {
        if (x.state === 'succeeded') toast.done(t.drawer.finished(x.title, x.state));
        else toast.failed(new Error(x.problem?.cause ?? ''), t.drawer.finished(x.title, x.state));
      }
    }
  }, [tasks, session, toast]);
  return (
    <NotificationDrawer aria-label={t.drawer.title}>
      <NotificationDrawerHeader title={t.drawer.title} onClose={onClose} customText="">
        <Link to="/tasks">{t.drawer.all}</Link>
      </NotificationDrawerHeader>
      <NotificationDrawerBody>
        {tasks.length === 0 && <EmptyState titleText={t.drawer.none} headingLevel="h2" variant="sm"><EmptyStateBody>{t.drawer.noneBody}</EmptyStateBody></EmptyState>}
        <NotificationDrawerList aria-label={t.drawer.title}>
          {tasks.slice(0, recentTasks).map((x) => (
            <NotificationDrawerListItem key={x.id} variant={x.state === 'failed' ? 'danger' : x.state === 'succeeded' ? 'success' : x.state === 'cancelled' ? 'warning' : 'info'}
              isRead={over(x)} tabIndex={-1}>
              <NotificationDrawerListItemHeader title={x.title} headingLevel="h2" variant={x.state === 'failed' ? 'danger' : x.state === 'succeeded' ? 'success' : 'info'}
                srTitle={x.state} />
              <NotificationDrawerListItemBody timestamp={ago(x.ended ?? x.started ?? x.created)}>
                <TaskFacts task={x} />
              </NotificationDrawerListItemBody>
            </NotificationDrawerListItem>
          ))}
        </NotificationDrawerList>
      </NotificationDrawerBody>
    </NotificationDrawer>
  );
}

/** A task's object, progress, steps, problem, and what can be done about it. */
export function TaskFacts({ task: x, all = false, words = t.drawer }: { task: Task; all?: boolean; words?: { cancel: string; again: string } }) {
  const may = useMay();
  const refresh = useRefresh();
  const toast = useToast();
  const act = (op: 'cancelTask' | 'retryTask') => call(op, { path: { task: x.id } }).then(() => refresh('listTasks', 'getTask'), (e: unknown) => toast.failed(e));
  const part = percent(x.done, x.total);
  const spent = x.started ? (Date.now() - new Date(x.started).getTime()) / 1000 : 0;
  return (
    <div className="varve-stack">
      <span>{x.object} <span className="varve-dim">{t.drawer.by} {x.by}</span></span>
      {x.state === 'running' && (
        <Progress size="sm" value={part} aria-label={x.title} {...(x.total > 0 ? {} : { measureLocation: 'none' as const })} />
      )}
      {x.state === 'running' && x.total > 0 && part >= 10 && <span className="varve-dim">{t.drawer.eta(duration((spent / part) * (100 - part)))}</span>}
      {x.steps.length > 0 && (all || !over(x)) && (
        <ProgressStepper isVertical isCompact={false} aria-label={x.title}>
          {x.steps.map((s, i) => (
            <ProgressStep key={s.name + i} id={`${x.id}-${i}`} titleId={`${x.id}-${i}-t`} variant={s.ended ? 'success' : x.state === 'failed' ? 'danger' : 'info'} isCurrent={!s.ended && !over(x)}
              aria-label={s.name}>{s.name}</ProgressStep>
          ))}
        </ProgressStepper>
      )}
      {x.problem && <span>{x.problem.cause} {x.problem.consequence} <strong>{x.problem.remedy}</strong></span>}
      <span className="varve-row">
        {x.can_cancel && may('cancelTask') && <Button variant="link" isInline onClick={() => void act('cancelTask')}>{words.cancel}</Button>}
        {['failed', 'cancelled'].includes(x.state) && may('retryTask') && <Button variant="link" isInline onClick={() => void act('retryTask')}>{words.again}</Button>}
      </span>
    </div>
  );
}
