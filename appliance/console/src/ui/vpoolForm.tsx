// The form of a vPool, for its page and for the first run.
import { useState } from 'react';
import { storage } from '../strings/storage';
import { CheckField, SelectField, TextAreaField, TextField } from './fields';

const s = storage.vpools;

/** What is typed about a vPool, and the request that it makes. */
export function useVPoolForm() {
  const [name, setName] = useState('');
  const [kind, setKind] = useState('local');
  const [dir, setDir] = useState('');
  const [endpoint, setEndpoint] = useState('');
  const [bucket, setBucket] = useState('');
  const [prefix, setPrefix] = useState('');
  const [region, setRegion] = useState('us-east-1');
  const [access, setAccess] = useState('');
  const [secret, setSecret] = useState('');
  const [ca, setCA] = useState('');
  const [clients, setClients] = useState('');
  const [compression, setCompression] = useState('');
  const [encrypt, setEncrypt] = useState(false);
  const [unsafe, setUnsafe] = useState(false);
  const networks = clients.split(/[\s,]+/).filter(Boolean);
  const backend = kind === 'local' ? `local://${dir}`
    : `s3://${bucket}${prefix ? `/${prefix}` : ''}?endpoint=${encodeURIComponent(endpoint)}&region=${encodeURIComponent(region)}`;
  const body = {
    name, backend,
    ...(networks.length > 0 ? { clients: networks } : {}),
    ...(kind === 's3' ? { credentials: { access_key: access, secret_key: secret } } : {}),
    ...(kind === 's3' && ca ? { ca } : {}),
    ...(compression ? { compression } : {}),
    ...(encrypt ? { encrypt } : {}),
    ...(unsafe ? { allow_unsafe: true } : {}),
  };
  const complete = name !== '' && (kind === 'local' ? dir.startsWith('/') : endpoint !== '' && bucket !== '' && access !== '' && secret !== '');
  const fields = (
    <>
      <TextField label={storage.name} name="name" value={name} onChange={setName} required autoFocus help={s.nameHelp} />
      <SelectField label={s.kind} name="backend" value={kind} onChange={setKind} options={[['local', s.local], ['s3', s.s3]]} />
      {kind === 'local' ? (
        <TextField label={s.dir} name="dir" value={dir} onChange={setDir} required mono help={s.dirHelp} placeholder="/srv/varve/fast" />
      ) : (
        <>
          <TextField label={s.endpoint} name="endpoint" value={endpoint} onChange={setEndpoint} required mono placeholder="https://s3.example.com" />
          <TextField label={s.bucket} name="bucket" value={bucket} onChange={setBucket} required mono />
          <TextField label={s.prefix} name="prefix" value={prefix} onChange={setPrefix} mono />
          <TextField label={s.region} name="region" value={region} onChange={setRegion} mono />
          <TextField label={s.access} name="credentials/access_key" value={access} onChange={setAccess} required mono />
          <TextField label={s.secret} name="credentials/secret_key" type="password" value={secret} onChange={setSecret} required autoComplete="new-password" help={s.secretHelp} />
          <TextAreaField label={s.ca} name="ca" value={ca} onChange={setCA} rows={2} mono help={s.caHelp} />
        </>
      )}
      <TextAreaField label={s.clients} name="clients" value={clients} onChange={setClients} rows={2} mono help={s.clientsHelp} />
      <SelectField label={s.compression} name="compression" value={compression} onChange={setCompression}
        options={[['', s.compressionDefault], ['none', 'none'], ['s2', 's2'], ['zstd', 'zstd']]} />
      <CheckField label={s.encrypt} name="encrypt" value={encrypt} onChange={setEncrypt} help={s.encryptHelp} />
      {kind === 's3' && <CheckField label={s.unsafe} name="allow_unsafe" value={unsafe} onChange={setUnsafe} help={s.unsafeHelp} />}
    </>
  );
  return { body, complete, fields, name };
}
