// Package ova writes the appliance as an OVA (DMTF DSP0243, OVF 1.1): a ustar archive of descriptor, manifest and system disk, in
// this order, which can be read in one pass. Importers read only parts of a descriptor, each its own; the shapes here are those
// that all of them take:
//
//	exactly one CPU and one memory item    Proxmox VE joins the numbers of all items that it finds, Xen Orchestra takes the last
//	MB, byte * 2^30, ovf:/disk/ID          the only units and references that Proxmox VE knows
//	the data disk has no file              vSphere and ESXi make it by its capacity; Proxmox VE leaves it out, so it is optional
//	every property a string, none required an empty required value keeps vSphere from powering on
//	no vmw:ExtraConfig, no OVF 2.0         ovftool and vSphere refuse or warn
//	"SHA256(name)= hex"                    without blanks before the bracket, which ESXi takes for the name of an algorithm
//
// Lint is these rules as code: it reads an OVA the way each importer does.
package ova

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"text/template"
)

// Appliance is what the descriptor says of the VM. It is one for every size of host: CPUs and memory are changed when it is
// deployed, never chosen from a list of configurations.
type Appliance struct {
	Name, Version, Vendor, URL string
	CPUs, MemoryMB             int
	SystemDisk                 string // file name of the VMDK
	SystemBytes, SystemFile    int64  // capacity, and the file's length
	DataGB                     int    // of the data disk that the importer makes
	Properties                 []Category
}

// Category groups properties on the page that vSphere shows.
type Category struct {
	Name       string
	Properties []Property
}

// Property is a setting, a string that may stay empty. The appliance reads it as guestinfo.varve.KEY.
type Property struct {
	Key, Label, About string
	Secret            bool
}

// Properties are the appliance's settings as its first boot reads them.
func Properties() []Category {
	return []Category{
		{Name: "Network", Properties: []Property{
			{Key: "hostname", Label: "Host name", About: "Empty: varve and the machine's number."},
			{Key: "mgmt_ip", Label: "Management address", About: "With its prefix, 192.0.2.10/24. Empty: DHCP."},
			{Key: "gateway", Label: "Gateway"},
			{Key: "dns", Label: "DNS servers", About: "Separated by blanks."},
			{Key: "search", Label: "DNS search domains", About: "Separated by blanks."},
			{Key: "vlan", Label: "VLAN of the management network", About: "A number. Empty: untagged."},
			{Key: "ntp", Label: "Time servers", About: "Separated by blanks. Empty: from DHCP, else the public pool."},
			{Key: "mgmt_ip6", Label: "Management address, IPv6", About: "With its prefix. Empty: router advertisements."},
			{Key: "gateway6", Label: "Gateway, IPv6"},
			{Key: "storage_ip", Label: "Storage address", About: "With its prefix, on the second network, where hypervisors mount. Empty: DHCP."},
			{Key: "storage_mtu", Label: "MTU of the storage network", About: "1500 to 9000."},
		}},
		{Name: "Identity", Properties: []Property{
			{Key: "admin_password", Label: "Administrator's password", About: "Empty: the screen shows a set-up code. Forgotten after the first boot.", Secret: true},
			{Key: "ssh_keys", Label: "SSH public keys", About: "SSH stays off until it is started at the screen."},
			{Key: "timezone", Label: "Time zone", About: "Europe/Brussels. Empty: UTC."},
		}},
		{Name: "Cluster", Properties: []Property{
			{Key: "mode", Label: "new, join or ask", About: "Empty: join with a token, else new."},
			{Key: "join_token", Label: "Join token", About: "From `varve cluster token create`; valid for an hour.", Secret: true},
			{Key: "cluster_name", Label: "Name of a new cluster"},
		}},
	}
}

var descriptor = template.Must(template.New("ovf").Funcs(template.FuncMap{"x": escape}).Parse(`<?xml version="1.0" encoding="UTF-8"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"
	xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData"
	xmlns:vssd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData"
	xmlns:vmw="http://www.vmware.com/schema/ovf" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance">
  <References>
    <File ovf:id="file1" ovf:href="{{x .SystemDisk}}" ovf:size="{{.SystemFile}}"/>
  </References>
  <DiskSection>
    <Info>Virtual disks</Info>
    <Disk ovf:diskId="vmdisk1" ovf:fileRef="file1" ovf:capacity="{{.SystemGB}}" ovf:capacityAllocationUnits="byte * 2^30" ovf:format="http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized" ovf:populatedSize="{{.SystemFile}}"/>
    <Disk ovf:diskId="vmdisk2" ovf:capacity="{{.DataGB}}" ovf:capacityAllocationUnits="byte * 2^30" ovf:format="http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"/>
  </DiskSection>
  <NetworkSection>
    <Info>Networks</Info>
    <Network ovf:name="management">
      <Description>Console, API, other appliances</Description>
    </Network>
    <Network ovf:name="storage">
      <Description>Hypervisors mount and attach here; a host-private network is best</Description>
    </Network>
  </NetworkSection>
  <VirtualSystem ovf:id="{{x .Name}}">
    <Info>A virtual storage appliance</Info>
    <Name>{{x .Name}}</Name>
    <OperatingSystemSection ovf:id="96" vmw:osType="debian10_64Guest">
      <Info>Guest operating system</Info>
      <Description>Debian GNU/Linux (64-bit)</Description>
    </OperatingSystemSection>
    <VirtualHardwareSection ovf:transport="com.vmware.guestInfo iso">
      <Info>Virtual hardware</Info>
      <System>
        <vssd:ElementName>Virtual Hardware Family</vssd:ElementName>
        <vssd:InstanceID>0</vssd:InstanceID>
        <vssd:VirtualSystemIdentifier>{{x .Name}}</vssd:VirtualSystemIdentifier>
        <vssd:VirtualSystemType>vmx-14</vssd:VirtualSystemType>
      </System>
      <Item>
        <rasd:AllocationUnits>hertz * 10^6</rasd:AllocationUnits>
        <rasd:Description>Number of virtual CPUs</rasd:Description>
        <rasd:ElementName>{{.CPUs}} virtual CPUs</rasd:ElementName>
        <rasd:InstanceID>1</rasd:InstanceID>
        <rasd:ResourceType>3</rasd:ResourceType>
        <rasd:VirtualQuantity>{{.CPUs}}</rasd:VirtualQuantity>
      </Item>
      <Item>
        <rasd:AllocationUnits>byte * 2^20</rasd:AllocationUnits>
        <rasd:Description>Memory size</rasd:Description>
        <rasd:ElementName>{{.MemoryMB}} MB of memory</rasd:ElementName>
        <rasd:InstanceID>2</rasd:InstanceID>
        <rasd:ResourceType>4</rasd:ResourceType>
        <rasd:VirtualQuantity>{{.MemoryMB}}</rasd:VirtualQuantity>
      </Item>
      <Item>
        <rasd:Address>0</rasd:Address>
        <rasd:Description>SCSI controller of the system disk</rasd:Description>
        <rasd:ElementName>SCSI controller 0</rasd:ElementName>
        <rasd:InstanceID>3</rasd:InstanceID>
        <rasd:ResourceSubType>lsilogic</rasd:ResourceSubType>
        <rasd:ResourceType>6</rasd:ResourceType>
      </Item>
      <Item>
        <rasd:AddressOnParent>0</rasd:AddressOnParent>
        <rasd:ElementName>System disk</rasd:ElementName>
        <rasd:HostResource>ovf:/disk/vmdisk1</rasd:HostResource>
        <rasd:InstanceID>4</rasd:InstanceID>
        <rasd:Parent>3</rasd:Parent>
        <rasd:ResourceType>17</rasd:ResourceType>
      </Item>
      <Item ovf:required="false">
        <rasd:AddressOnParent>1</rasd:AddressOnParent>
        <rasd:ElementName>Data disk</rasd:ElementName>
        <rasd:HostResource>ovf:/disk/vmdisk2</rasd:HostResource>
        <rasd:InstanceID>5</rasd:InstanceID>
        <rasd:Parent>3</rasd:Parent>
        <rasd:ResourceType>17</rasd:ResourceType>
      </Item>
      <Item>
        <rasd:AddressOnParent>7</rasd:AddressOnParent>
        <rasd:AutomaticAllocation>true</rasd:AutomaticAllocation>
        <rasd:Connection>management</rasd:Connection>
        <rasd:Description>Management network</rasd:Description>
        <rasd:ElementName>Network adapter 1</rasd:ElementName>
        <rasd:InstanceID>6</rasd:InstanceID>
        <rasd:ResourceSubType>VmxNet3</rasd:ResourceSubType>
        <rasd:ResourceType>10</rasd:ResourceType>
      </Item>
      <Item>
        <rasd:AddressOnParent>8</rasd:AddressOnParent>
        <rasd:AutomaticAllocation>true</rasd:AutomaticAllocation>
        <rasd:Connection>storage</rasd:Connection>
        <rasd:Description>Storage network</rasd:Description>
        <rasd:ElementName>Network adapter 2</rasd:ElementName>
        <rasd:InstanceID>7</rasd:InstanceID>
        <rasd:ResourceSubType>VmxNet3</rasd:ResourceSubType>
        <rasd:ResourceType>10</rasd:ResourceType>
      </Item>
      <Item ovf:required="false">
        <rasd:Address>1</rasd:Address>
        <rasd:ElementName>IDE controller</rasd:ElementName>
        <rasd:InstanceID>8</rasd:InstanceID>
        <rasd:ResourceType>5</rasd:ResourceType>
      </Item>
      <Item ovf:required="false">
        <rasd:AddressOnParent>0</rasd:AddressOnParent>
        <rasd:AutomaticAllocation>false</rasd:AutomaticAllocation>
        <rasd:ElementName>CD/DVD drive</rasd:ElementName>
        <rasd:InstanceID>9</rasd:InstanceID>
        <rasd:Parent>8</rasd:Parent>
        <rasd:ResourceSubType>vmware.cdrom.remotepassthrough</rasd:ResourceSubType>
        <rasd:ResourceType>15</rasd:ResourceType>
      </Item>
      <vmw:Config ovf:required="false" vmw:key="firmware" vmw:value="efi"/>
      <vmw:Config ovf:required="false" vmw:key="tools.syncTimeWithHost" vmw:value="false"/>
    </VirtualHardwareSection>
    <ProductSection>
      <Info>Settings of the appliance; all may stay empty</Info>
      <Product>Varve</Product>
      <Vendor>{{x .Vendor}}</Vendor>
      <Version>{{x .Version}}</Version>
      <FullVersion>{{x .Version}}</FullVersion>
      <ProductUrl>{{x .URL}}</ProductUrl>
{{- range .Properties}}
      <Category>{{x .Name}}</Category>
{{- range .Properties}}
      <Property ovf:key="guestinfo.varve.{{x .Key}}" ovf:type="string" ovf:userConfigurable="true" ovf:value=""{{if .Secret}} ovf:password="true"{{end}}>
        <Label>{{x .Label}}</Label>
{{- if .About}}
        <Description>{{x .About}}</Description>
{{- end}}
      </Property>
{{- end}}
{{- end}}
    </ProductSection>
  </VirtualSystem>
</Envelope>
`))

// SystemGB is the system disk's capacity, in whole GiB.
func (a Appliance) SystemGB() int64 { return a.SystemBytes >> 30 }

// Descriptor gives the .ovf.
func (a Appliance) Descriptor() ([]byte, error) {
	if a.SystemBytes <= 0 || a.SystemBytes%(1<<30) != 0 || a.CPUs <= 0 || a.MemoryMB <= 0 || a.DataGB <= 0 || a.Name == "" || a.SystemDisk == "" {
		return nil, fmt.Errorf("describe %+v: a name, a disk of whole GiB and sizes are needed", a)
	}
	var b bytes.Buffer
	if err := descriptor.Execute(&b, a); err != nil {
		return nil, fmt.Errorf("write descriptor: %w", err)
	}
	return b.Bytes(), nil
}

func escape(s string) (string, error) {
	var b bytes.Buffer
	err := xml.EscapeText(&b, []byte(s))
	return b.String(), err
}
