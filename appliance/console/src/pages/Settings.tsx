// What is set for the whole cluster: receivers of events, settings, branding; and a vPool's rebuild.
import { Button, Card, CardBody, FileUpload, Form, FormGroup, List, ListItem, Modal, ModalBody, ModalHeader } from '@patternfly/react-core';
import { BellIcon, CogsIcon, PaletteIcon } from '@patternfly/react-icons';
import { Table, Tbody, Td, Th, Thead, Tr } from '@patternfly/react-table';
import { useState } from 'react';
import { call } from '../api/call';
import type { Answer, ItemOf } from '../api/call';
import { useCall, useRefresh } from '../api/query';
import { useMay } from '../api/session';
import { t } from '../strings';
import { running } from '../strings/running';
import { Destroy, FormDialog } from '../ui/dialog';
import { CheckField, SelectField, TextAreaField, TextField } from '../ui/fields';
import { ObjectTable } from '../ui/ObjectTable';
import { Loaded, Page } from '../ui/Page';
import { ProblemAlert } from '../ui/Problem';
import { Secret, lines } from '../ui/Secret';
import { Bytes, State, When } from '../ui/State';
import { useToast } from '../ui/toast';

type Sink = ItemOf<'listSinks'>;
type Key = ItemOf<'listConfig'>;
type Branding = ItemOf<'listBrandings'>;

export function Sinks() {
  const s = running.sinks;
  const may = useMay();
  const toast = useToast();
  const refresh = useRefresh();
  const [doing, setDoing] = useState<{ what: 'create' } | { what: 'edit' | 'delete'; sink: Sink }>();
  const [secret, setSecret] = useState<{ name: string; secret: string }>();
  const close = () => setDoing(undefined);
  const create = may('createSink') && <Button onClick={() => setDoing({ what: 'create' })}>{s.create}</Button>;
  return (
    <Page title={s.title} lead={s.lead} actions={create} operations={['listSinks', 'createSink', 'setSink', 'deleteSink']}>
      <ObjectTable id="sinks" label={s.title} op="listSinks" rowKey={(x: Sink) => x.id} sort="name" every={10_000}
        columns={[
          { key: 'name', title: running.name, cell: (x) => x.name }, { key: 'kind', title: s.kind, cell: (x) => x.kind }, { key: 'url', title: s.url, cell: (x) => <span className="varve-mono">{x.url}</span> },
          { key: 'enabled', title: running.state, cell: (x) => (x.error ? <State value="failing" /> : <State value={x.enabled ? 'ok' : 'disabled'} />) }, { key: 'sent', title: s.sent, right: true, cell: (x) => x.sent },
          { key: 'missed', title: s.missed, right: true, cell: (x) => x.missed }, { key: 'failing', title: s.failing, cell: (x) => (x.failing ? <><When at={x.failing} /> {x.error}</> : '') },
        ]}
        actions={(x) => [
          { title: running.edit, disabled: !may('setSink'), onClick: () => setDoing({ what: 'edit', sink: x }) }, { title: running.delete, danger: true, separated: true, disabled: !may('deleteSink'), onClick: () => setDoing({ what: 'delete', sink: x }) },
        ]}
        empty={{ title: s.empty, body: s.emptyBody, action: create, icon: BellIcon }} />
      {doing && doing.what !== 'delete' && <SinkDialog {...(doing.what === 'edit' ? { sink: doing.sink } : {})} onClose={close} onSecret={(name, key) => setSecret({ name, secret: key })} />}
      {secret && <Secret title={s.secretTitle(secret.name)} secret={secret.secret} onClose={() => setSecret(undefined)} />}
      {doing?.what === 'delete' && (
        <Destroy title={running.deleteTitle(doing.sink.name)} verb={t.remove} op="deleteSink" args={{ path: { sink: doing.sink.name }, rev: doing.sink.rev }} onClose={close}
          onDone={() => { toast.done(running.deleted(doing.sink.name)); void refresh('listSinks'); }} />
      )}
    </Page>
  );
}

function SinkDialog({ sink, onClose, onSecret }: { sink?: Sink; onClose: () => void; onSecret: (name: string, secret: string) => void }) {
  const s = running.sinks;
  const [name, setName] = useState(sink?.name ?? '');
  const [kind, setKind] = useState(sink?.kind ?? 'webhook');
  const [url, setURL] = useState(sink?.url ?? '');
  const [exchange, setExchange] = useState(sink?.exchange ?? '');
  const [topics, setTopics] = useState((sink?.topics ?? []).join('\n'));
  const [types, setTypes] = useState((sink?.types ?? []).join('\n'));
  const [secret, setSecret] = useState('');
  const [ca, setCA] = useState(sink?.ca ?? '');
  const [here, setHere] = useState(sink?.local ?? false);
  const [off, setOff] = useState(sink ? !sink.enabled : false);
  const refresh = useRefresh();
  return (
    <FormDialog wide title={sink ? sink.name : s.create} submit={sink ? t.save : t.create} onClose={onClose} disabled={!name || !url} onSubmit={async () => {
      const body = { name, kind, url, topics: lines(topics), types: lines(types), local: here, disabled: off, ...(exchange ? { exchange } : {}), ...(secret ? { secret } : {}), ...(ca ? { ca } : {}) };
      if (sink) {
        await call('setSink', { path: { sink: sink.name }, rev: sink.rev, body });
      } else {
        const made = await call('createSink', { body });
        if (made.secret) onSecret(name, made.secret);
      }
      await refresh('listSinks');
    }}>
      <TextField label={running.name} name="name" value={name} onChange={setName} required autoFocus={!sink} />
      <SelectField label={s.kind} name="kind" value={kind} onChange={setKind} options={[['webhook', 'webhook'], ['amqp', 'AMQP']]} disabled={Boolean(sink)} />
      <TextField label={s.url} name="url" value={url} onChange={setURL} required mono placeholder={kind === 'amqp' ? 'amqps://mq.example.com:5671/' : 'https://hooks.example.com/varve'} />
      {kind === 'amqp' && <TextField label={s.exchange} name="exchange" value={exchange} onChange={setExchange} mono />}
      <TextField label={s.secret} name="secret" type="password" value={secret} onChange={setSecret} autoComplete="new-password" help={s.secretHelp} />
      <TextAreaField label={s.topics} name="topics" value={topics} onChange={setTopics} rows={2} help={s.topicsHelp} />
      <TextAreaField label={s.types} name="types" value={types} onChange={setTypes} rows={2} help={s.topicsHelp} />
      <TextAreaField label={s.ca} name="ca" value={ca} onChange={setCA} rows={2} mono />
      <CheckField label={s.local} name="local" value={here} onChange={setHere} />
      <CheckField label={s.off} name="disabled" value={off} onChange={setOff} />
    </FormDialog>
  );
}

export function Config() {
  const s = running.config;
  const may = useMay();
  const toast = useToast();
  const refresh = useRefresh();
  const [editing, setEditing] = useState<Partial<Key>>();
  const [shown, setShown] = useState('');
  const [deleting, setDeleting] = useState<Key>();
  const create = may('setConfig') && <Button onClick={() => setEditing({})}>{s.create}</Button>;
  return (
    <Page title={s.title} lead={s.lead} actions={create} operations={['listConfig', 'getConfig', 'setConfig', 'unsetConfig']}>
      <ObjectTable id="config" label={s.title} op="listConfig" rowKey={(x: Key) => x.key} search="key" searchLabel={s.filter} sort="key"
        columns={[
          { key: 'key', title: s.key, cell: (x) => <Button variant="link" isInline onClick={() => setShown(x.key)}>{x.key}</Button> }, { key: 'value', title: s.value, cell: (x) => <span className="varve-code">{x.value}</span> },
          { key: 'version', title: s.version, right: true, cell: (x) => x.version }, { key: 'by', title: s.by, cell: (x) => x.by ?? '' }, { key: 'at', title: s.at, cell: (x) => <When at={x.at} /> },
        ]}
        actions={(x) => [
          { title: running.edit, disabled: !may('setConfig'), onClick: () => setEditing(x) }, { title: s.former, onClick: () => setShown(x.key) },
          { title: s.unset, danger: true, separated: true, disabled: !may('unsetConfig'), onClick: () => setDeleting(x) },
        ]}
        empty={{ title: s.empty, body: s.emptyBody, action: create, icon: CogsIcon }} />
      {editing && <ConfigDialog item={editing} onClose={() => setEditing(undefined)} />}
      {shown && <Former name={shown} onClose={() => setShown('')} onBack={(value) => { setShown(''); setEditing({ key: shown, value }); }} />}
      {deleting && (
        <Destroy title={`${s.unset}: ${deleting.key}`} verb={s.unset} op="unsetConfig" args={{ path: { key: deleting.key }, rev: deleting.rev }} onClose={() => setDeleting(undefined)}
          onDone={() => { toast.done(running.deleted(deleting.key)); void refresh('listConfig'); }} />
      )}
    </Page>
  );
}

function ConfigDialog({ item, onClose }: { item: Partial<Key>; onClose: () => void }) {
  const s = running.config;
  const [key, setKey] = useState(item.key ?? '');
  const [value, setValue] = useState(item.value ?? '');
  const refresh = useRefresh();
  return (
    <FormDialog title={item.key ?? s.create} submit={t.save} onClose={onClose} disabled={!key} onSubmit={async () => {
      await call('setConfig', { path: { key }, rev: item.rev ?? 0, body: { value } });
      await refresh('listConfig', 'getConfig');
    }}>
      <TextField label={s.key} name="key" value={key} onChange={setKey} disabled={Boolean(item.key)} required mono autoFocus={!item.key} />
      <TextAreaField label={s.value} name="value" value={value} onChange={setValue} mono />
    </FormDialog>
  );
}

function Former({ name, onClose, onBack }: { name: string; onClose: () => void; onBack: (value: string) => void }) {
  const s = running.config;
  const query = useCall('getConfig', { path: { key: name } });
  return (
    <Modal isOpen variant="medium" onClose={onClose} aria-labelledby="former-title">
      <ModalHeader title={`${s.former}: ${name}`} labelId="former-title" />
      <ModalBody>
        <Loaded query={query}>
          {(k) => (
            <Table variant="compact" aria-label={s.former}>
              <Thead><Tr><Th>{s.version}</Th><Th>{s.value}</Th><Th>{s.by}</Th><Th>{s.at}</Th><Th screenReaderText={running.actions} /></Tr></Thead>
              <Tbody>
                {[{ value: k.value, version: k.version, by: k.by, at: k.at }, ...(k.former ?? [])].map((v) => (
                  <Tr key={v.version}><Td>{v.version}</Td><Td className="varve-code">{v.value}</Td><Td>{v.by ?? ''}</Td><Td><When at={v.at} exact /></Td>
                    <Td>{v.version !== k.version && <Button variant="link" isInline onClick={() => onBack(v.value)}>{s.back}</Button>}</Td></Tr>
                ))}
              </Tbody>
            </Table>
          )}
        </Loaded>
      </ModalBody>
    </Modal>
  );
}

export function Brandings() {
  const s = running.branding;
  const may = useMay();
  const toast = useToast();
  const refresh = useRefresh();
  const [doing, setDoing] = useState<{ what: 'create' } | { what: 'edit' | 'delete'; branding: Branding }>();
  const close = () => setDoing(undefined);
  const create = may('createBranding') && <Button onClick={() => setDoing({ what: 'create' })}>{s.create}</Button>;
  return (
    <Page title={s.title} lead={s.lead} actions={create} operations={['listBrandings', 'createBranding', 'setBranding', 'deleteBranding']}>
      <ObjectTable id="brandings" label={s.title} op="listBrandings" rowKey={(x: Branding) => x.id} sort="name"
        columns={[{ key: 'name', title: running.name, cell: (x) => x.name }, { key: 'product', title: s.product, cell: (x) => x.product }, { key: 'default', title: s.isDefault, cell: (x) => (x.default ? running.yes : running.no) }]}
        actions={(x) => [
          { title: running.edit, disabled: !may('setBranding'), onClick: () => setDoing({ what: 'edit', branding: x }) }, { title: running.delete, danger: true, separated: true, disabled: !may('deleteBranding'), onClick: () => setDoing({ what: 'delete', branding: x }) },
        ]}
        empty={{ title: s.empty, body: s.emptyBody, action: create, icon: PaletteIcon }} />
      {doing && doing.what !== 'delete' && <BrandingDialog {...(doing.what === 'edit' ? { branding: doing.branding } : {})} onClose={close} />}
      {doing?.what === 'delete' && (
        <Destroy title={running.deleteTitle(doing.branding.name)} verb={t.remove} op="deleteBranding" args={{ path: { branding: doing.branding.name }, rev: doing.branding.rev }} onClose={close}
          onDone={() => { toast.done(running.deleted(doing.branding.name)); void refresh('listBrandings'); }} />
      )}
    </Page>
  );
}

const logoBytesMax = 64 * 1024;

function BrandingDialog({ branding, onClose }: { branding?: Branding; onClose: () => void }) {
  const s = running.branding;
  const [name, setName] = useState(branding?.name ?? '');
  const [product, setProduct] = useState(branding?.product ?? '');
  const [logo, setLogo] = useState(branding?.logo ?? '');
  const [file, setFile] = useState('');
  const [shown, setShown] = useState(branding?.default ?? true);
  const toast = useToast();
  const refresh = useRefresh();
  const take = (f: File) => {
    if (f.size > logoBytesMax) return toast.failed(new Error(s.tooLarge));
    setFile(f.name);
    void f.arrayBuffer().then((b) => setLogo(btoa(Array.from(new Uint8Array(b), (x) => String.fromCharCode(x)).join(''))));
  };
  return (
    <FormDialog title={branding ? branding.name : s.create} submit={branding ? t.save : t.create} onClose={onClose} disabled={!name || !product} onSubmit={async () => {
      const body = { name, product, default: shown, ...(logo ? { logo } : {}), ...(branding?.colour ? { colour: branding.colour } : {}) };
      if (branding) await call('setBranding', { path: { branding: branding.name }, rev: branding.rev, body });
      else await call('createBranding', { body });
      await refresh('listBrandings');
    }}>
      <TextField label={running.name} name="name" value={name} onChange={setName} required autoFocus />
      <TextField label={s.product} name="product" value={product} onChange={setProduct} required />
      <FormGroup label={s.logo} fieldId="logo">
        <FileUpload id="logo" filename={file} filenamePlaceholder="PNG" onFileInputChange={(_, f) => take(f)} onClearClick={() => { setFile(''); setLogo(''); }} hideDefaultPreview browseButtonText={s.choose} aria-label={s.logo}
          dropzoneProps={{ accept: { 'image/png': ['.png'] } }} />
      </FormGroup>
      <CheckField label={s.show} name="default" value={shown} onChange={setShown} />
    </FormDialog>
  );
}

export function Rebuild() {
  const s = running.rebuild;
  const [name, setName] = useState('');
  const [backend, setBackend] = useState('');
  const [busy, setBusy] = useState(false);
  const [error, setError] = useState<unknown>();
  const [report, setReport] = useState<Answer<'rebuild'>>();
  const go = () => {
    setBusy(true);
    setError(undefined);
    call('rebuild', { body: { name, ...(backend ? { backend } : {}) } }).then(setReport, setError).finally(() => setBusy(false));
  };
  return (
    <Page title={s.title} lead={s.lead} operations={['rebuild']}>
      <Card><CardBody className="varve-stack">
        <Form isWidthLimited onSubmit={(e) => { e.preventDefault(); go(); }}>
          {error !== undefined && <ProblemAlert error={error} focus />}
          <TextField label={s.name} name="name" value={name} onChange={setName} required help={s.nameHelp} />
          <TextField label={s.backend} name="backend" value={backend} onChange={setBackend} mono placeholder="s3://bucket/prefix?endpoint=https://host:port" />
          <div><Button type="submit" isLoading={busy} isDisabled={busy || !name}>{s.go}</Button></div>
        </Form>
        {report && (
          <List>
            {report.volumes.map((v) => <ListItem key={v.id}>{v.path}: <Bytes n={v.size} />, {s.written} <When at={v.written} exact />, {s.lost}: {v.lost} {v.detail}</ListItem>)}
          </List>
        )}
      </CardBody></Card>
    </Page>
  );
}
