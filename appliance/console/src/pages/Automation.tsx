// What the cluster does by itself: policies and schedules.
import { Button, Content } from '@patternfly/react-core';
import { CalendarAltIcon, ShieldAltIcon } from '@patternfly/react-icons';
import { useState } from 'react';
import { call } from '../api/call';
import type { ItemOf } from '../api/call';
import { useCall, useRefresh } from '../api/query';
import { useMay } from '../api/session';
import { t } from '../strings';
import { running } from '../strings/running';
import { Destroy, FormDialog } from '../ui/dialog';
import { CheckField, SelectField, TextAreaField, TextField } from '../ui/fields';
import { bytes, parseBytes } from '../ui/format';
import { ObjectTable } from '../ui/ObjectTable';
import { Page } from '../ui/Page';
import { settingName, settingText } from '../ui/policy';
import { State, When } from '../ui/State';
import { useToast } from '../ui/toast';

type Policy = ItemOf<'listPolicies'>;
type Schedule = ItemOf<'listSchedules'>;
type Spec = Policy['set'];

function setText(set: Spec): string {
  return Object.entries(set).map(([k, v]) => `${settingName(k)}: ${settingText(k, v)}`).join('; ');
}

export function Policies() {
  const s = running.policies;
  const may = useMay();
  const toast = useToast();
  const refresh = useRefresh();
  const [editing, setEditing] = useState<string>();
  const [inheriting, setInheriting] = useState<Policy>();
  const create = may('setPolicy') && <Button onClick={() => setEditing('')}>{s.create}</Button>;
  return (
    <Page title={s.title} lead={s.lead} actions={create} operations={['listPolicies', 'getPolicy', 'setPolicy', 'inheritPolicy']}>
      <ObjectTable id="policies" label={s.title} op="listPolicies" rowKey={(x: Policy) => x.scope} search="scope" searchLabel={s.scope}
        columns={[
          { key: 'scope', title: s.scope, cell: (x) => x.scope }, { key: 'set', title: s.set, sortable: false, cell: (x) => setText(x.set), csv: (x) => JSON.stringify(x.set) },
          { key: 'modified', title: s.modified, cell: (x) => <When at={x.modified} /> },
        ]}
        actions={(x) => [
          { title: running.edit, disabled: !may('setPolicy'), onClick: () => setEditing(x.scope) }, { title: s.inherit, danger: true, separated: true, disabled: !may('inheritPolicy'), onClick: () => setInheriting(x) },
        ]}
        empty={{ title: s.empty, body: s.emptyBody, action: create, icon: ShieldAltIcon }} />
      {editing !== undefined && <PolicyDialog key={editing} scope={editing} onClose={() => setEditing(undefined)} />}
      {inheriting && (
        <Destroy title={`${s.inherit}: ${inheriting.scope}`} verb={s.inherit} op="inheritPolicy" args={{ path: { scope: inheriting.scope }, rev: inheriting.rev }} onClose={() => setInheriting(undefined)}
          onDone={() => { toast.done(s.inherited(inheriting.scope)); void refresh('listPolicies', 'getPolicy'); }} />
      )}
    </Page>
  );
}

function PolicyDialog({ scope, onClose }: { scope: string; onClose: () => void }) {
  const [chosen, setChosen] = useState(scope || 'cluster');
  const known = useCall('getPolicy', { path: { scope } }, { enabled: scope !== '' });
  if (scope !== '' && !known.data) return null;
  return <PolicyForm scope={chosen} fixed={scope !== ''} set={known.data?.set ?? {}} rev={known.data?.rev ?? 0} onScope={setChosen} onClose={onClose} />;
}

function PolicyForm({ scope, fixed, set, rev, onScope, onClose }: { scope: string; fixed: boolean; set: Spec; rev: number; onScope: (v: string) => void; onClose: () => void }) {
  const s = running.policies;
  const r = set.retention;
  const text = (n: number | undefined) => (n === undefined || n === null ? '' : String(n));
  const [all, setAll] = useState(text(r?.all_days));
  const [days, setDays] = useState(text(r?.buckets?.find((b) => b.days === 1)?.count));
  const [weeks, setWeeks] = useState(text(r?.buckets?.find((b) => b.days === 7)?.count));
  const [max, setMax] = useState(text(r?.count_max));
  const [iops, setIOPS] = useState(text(set.iops_max));
  const [rate, setRate] = useState(set.bytes_max === undefined ? '' : bytes(set.bytes_max).replace(' ', ''));
  const [overhead, setOverhead] = useState(text(set.space_overhead_percent));
  const [verify, setVerify] = useState(text(set.verify_days));
  const [zone, setZone] = useState(set.zone ?? '');
  const toast = useToast();
  const refresh = useRefresh();
  const n = (v: string) => Number(v);
  const numbers = [all, days, weeks, max, iops, overhead, verify];
  const retention = all || days || weeks || max ? {
    retention: { ...r, ...(all ? { all_days: n(all) } : {}), ...(max ? { count_max: n(max) } : {}),
      ...(days || weeks ? { buckets: [...(days ? [{ days: 1, count: n(days) }] : []), ...(weeks ? [{ days: 7, count: n(weeks) }] : [])] } : {}) },
  } : {};
  const { retention: _r, iops_max: _i, bytes_max: _b, space_overhead_percent: _o, verify_days: _v, zone: _z, ...rest } = set;
  return (
    <FormDialog wide title={s.create} description={s.inheritHelp} submit={t.save} onClose={onClose} disabled={!scope || numbers.some((x) => x !== '' && !/^\d+$/.test(x)) || (rate !== '' && Number.isNaN(parseBytes(rate)))}
      onSubmit={async () => {
        await call('setPolicy', { path: { scope }, rev, body: { ...rest, ...retention, ...(iops ? { iops_max: n(iops) } : {}), ...(rate ? { bytes_max: parseBytes(rate) } : {}),
          ...(overhead ? { space_overhead_percent: n(overhead) } : {}), ...(verify ? { verify_days: n(verify) } : {}), ...(zone ? { zone } : {}) } });
        await refresh('listPolicies', 'getPolicy');
        toast.done(s.saved(scope));
      }}>
      <TextField label={s.scope} name="scope" value={scope} onChange={onScope} disabled={fixed} required mono help={s.scopeHelp} />
      <div className="varve-fields">
        <TextField label={s.allDays} name="retention/all_days" value={all} onChange={setAll} />
        <TextField label={s.days} name="retention/buckets/0" value={days} onChange={setDays} />
        <TextField label={s.weeks} name="retention/buckets/1" value={weeks} onChange={setWeeks} />
        <TextField label={s.countMax} name="retention/count_max" value={max} onChange={setMax} />
        <TextField label={s.iops} name="iops_max" value={iops} onChange={setIOPS} />
        <TextField label={s.rate} name="bytes_max" value={rate} onChange={setRate} />
        <TextField label={s.overhead} name="space_overhead_percent" value={overhead} onChange={setOverhead} />
        <TextField label={s.verify} name="verify_days" value={verify} onChange={setVerify} />
        <TextField label={s.zone} name="zone" value={zone} onChange={setZone} placeholder="Europe/Brussels" />
      </div>
    </FormDialog>
  );
}

export function Schedules() {
  const s = running.schedules;
  const may = useMay();
  const toast = useToast();
  const refresh = useRefresh();
  const [doing, setDoing] = useState<{ what: 'change' | 'inherit'; schedule: Schedule } | { what: 'own' }>();
  const close = () => setDoing(undefined);
  const run = (x: Schedule) => void call('runSchedule', { path: { schedule: x.name }, query: { scope: x.scope } }).then(() => { toast.done(s.started); void refresh('listTasks', 'listSchedules'); }, (e: unknown) => toast.failed(e));
  return (
    <Page title={s.title} lead={s.lead} actions={may('setSchedule') && <Button variant="secondary" onClick={() => setDoing({ what: 'own' })}>{s.own}</Button>} operations={['listSchedules', 'setSchedule', 'inheritSchedule', 'runSchedule']}>
      <ObjectTable id="schedules" label={s.title} op="listSchedules" rowKey={(x: Schedule) => `${x.scope} ${x.name}`}
        columns={[
          { key: 'name', title: running.name, whole: true, cell: (x) => x.name }, { key: 'purpose', title: s.purpose, cell: (x) => x.purpose }, { key: 'scope', title: s.scope, cell: (x) => x.scope },
          { key: 'enabled', title: running.state, cell: (x) => (x.error ? <State value="error" text={s.error} /> : <State value={x.enabled ? 'enabled' : 'disabled'} text={x.enabled ? s.enabled : s.off} />) },
          { key: 'cron', title: s.cron, whole: true, cell: (x) => <span className="varve-mono">{x.cron}</span> }, { key: 'zone', title: s.zone, hidden: true, cell: (x) => x.zone }, { key: 'next', title: s.next, whole: true, cell: (x) => (x.enabled ? <When at={x.next} /> : '–') },
          { key: 'last', title: s.last, cell: (x) => <When at={x.last} /> }, { key: 'task', title: s.task, hidden: true, cell: (x) => x.task },
        ]}
        actions={(x) => [
          { title: s.run, disabled: !may('runSchedule'), onClick: () => run(x) }, { title: s.change, disabled: !may('setSchedule'), onClick: () => setDoing({ what: 'change', schedule: x }) },
          { title: s.inherit, separated: true, disabled: x.inherited || !may('inheritSchedule'), onClick: () => setDoing({ what: 'inherit', schedule: x }) },
        ]}
        empty={{ title: s.empty, body: '', icon: CalendarAltIcon }} />
      {doing?.what === 'change' && <ScheduleDialog schedule={doing.schedule} onClose={close} />}
      {doing?.what === 'own' && <ScheduleDialog onClose={close} />}
      {doing?.what === 'inherit' && (
        <Destroy title={`${s.inherit}: ${doing.schedule.name}`} verb={s.inherit} op="inheritSchedule" args={{ path: { schedule: doing.schedule.name }, query: { scope: doing.schedule.scope }, rev: doing.schedule.rev }} onClose={close}
          onDone={() => { toast.done(s.changed(doing.schedule.name)); void refresh('listSchedules'); }} />
      )}
    </Page>
  );
}

function ScheduleDialog({ schedule: x, onClose }: { schedule?: Schedule; onClose: () => void }) {
  const s = running.schedules;
  const [name, setName] = useState(x?.name ?? '');
  const [scope, setScope] = useState(x?.scope ?? 'cluster');
  const [cron, setCron] = useState(x?.cron ?? '');
  const [zone, setZone] = useState(x?.zone ?? Intl.DateTimeFormat().resolvedOptions().timeZone);
  const [off, setOff] = useState(x ? !x.enabled : false);
  const [task, setTask] = useState('');
  const [args, setArgs] = useState('');
  const toast = useToast();
  const refresh = useRefresh();
  return (
    <FormDialog title={x ? `${s.change}: ${x.name}` : s.own} submit={t.save} onClose={onClose} disabled={!name || !scope} onSubmit={async () => {
      await call('setSchedule', { path: { schedule: name }, query: { scope }, rev: x && x.scope === scope && !x.inherited ? x.rev : 0,
        body: { disabled: off, ...(cron ? { cron } : {}), ...(zone ? { zone } : {}), ...(task ? { task } : {}), ...(args ? { args: JSON.parse(args) as never } : {}) } });
      await refresh('listSchedules');
      toast.done(s.changed(name));
    }}>
      {!x && <TextField label={running.name} name="name" value={name} onChange={setName} required autoFocus />}
      <TextField label={s.scope} name="scope" value={scope} onChange={setScope} required mono help={running.policies.scopeHelp} />
      <TextField label={s.cron} name="cron" value={cron} onChange={setCron} mono help={s.cronHelp} />
      <TextField label={s.zone} name="zone" value={zone} onChange={setZone} />
      {!x && <SelectField label={s.ownTask} name="task" value={task} onChange={setTask} options={[['', ''], ['snapshot', 'snapshot'], ['vpool.scrub', 'vpool.scrub'], ['vpool.verify', 'vpool.verify']]} />}
      {!x && <TextAreaField label={s.args} name="args" value={args} onChange={setArgs} rows={2} mono />}
      <CheckField label={s.disabled} name="disabled" value={off} onChange={setOff} />
      {x && <Content component="p" className="varve-dim">{x.purpose}</Content>}
    </FormDialog>
  );
}
