import { Page } from '../ui/Page';

export default function VDisks() {
  return <Page title="VDisks" operations={[]}>{null}</Page>;
}
