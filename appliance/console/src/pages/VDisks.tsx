// All vDisks.
import { Button } from '@patternfly/react-core';
import { useState } from 'react';
import { useMay } from '../api/session';
import { storage } from '../strings/storage';
import { Page } from '../ui/Page';
import { CreateVDisk } from './parts/VDiskDialogs';
import { VDiskTable } from './parts/VDiskTable';

const s = storage.vdisks;

export default function VDisks() {
  const may = useMay();
  const [creating, setCreating] = useState(false);
  return (
    <Page title={s.title} lead={s.lead} actions={may('createVDisk') && <Button onClick={() => setCreating(true)}>{s.create}</Button>}
      operations={['listVDisks', 'createVDisk', 'createSnapshotGroup', 'deleteVDisk']}>
      <VDiskTable onCreate={() => setCreating(true)} />
      {creating && <CreateVDisk onClose={() => setCreating(false)} />}
    </Page>
  );
}
