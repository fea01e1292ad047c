// A secret that is shown once.
import { Alert, Button, ClipboardCopy, Modal, ModalBody, ModalFooter, ModalHeader } from '@patternfly/react-core';
import { t } from '../strings';
import { running } from '../strings/running';

export function Secret({ title, secret, onClose }: { title: string; secret: string; onClose: () => void }) {
  return (
    <Modal isOpen variant="small" aria-labelledby="secret-title" onClose={onClose}>
      <ModalHeader title={title} labelId="secret-title" />
      <ModalBody className="varve-stack">
        <Alert isInline variant="warning" title={running.oncely} component="h2" />
        <ClipboardCopy isReadOnly isCode textAriaLabel={title} hoverTip={t.copy} clickTip={t.copied}>{secret}</ClipboardCopy>
      </ModalBody>
      <ModalFooter><Button onClick={onClose}>{t.close}</Button></ModalFooter>
    </Modal>
  );
}

/** What was typed one a line. */
export const lines = (text: string) => text.split(/[\n,]+/).map((x) => x.trim()).filter(Boolean);
