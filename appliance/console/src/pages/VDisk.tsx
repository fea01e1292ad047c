import { Page } from '../ui/Page';

export default function VDisk() {
  return <Page title="VDisk" operations={[]}>{null}</Page>;
}
