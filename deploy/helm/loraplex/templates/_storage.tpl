{{/* Volumes, and the claims behind them. */}}

{{- define "loraplex.stateType" -}}
{{- if eq .Values.state.type "auto" -}}
{{- ternary "perPod" "emptyDir" (eq .Values.workload.kind "StatefulSet") -}}
{{- else -}}
{{- .Values.state.type -}}
{{- end -}}
{{- end -}}

{{- define "loraplex.claimSpec" -}}
accessModes: {{ toJson .accessModes }}
{{- with .storageClass }}
storageClassName: {{ . | quote }}
{{- end }}
resources:
  requests:
    storage: {{ .size }}
{{- end -}}

{{/* The volume behind one of `state` and `cache`; called with a list of the root, the name, its values and its type. */}}
{{- define "loraplex.dataVolume" -}}
{{- $root := index . 0 -}}
{{- $name := index . 1 -}}
{{- $values := index . 2 -}}
{{- $type := index . 3 -}}
{{- if eq $type "emptyDir" }}
- name: {{ $name }}
  emptyDir:
    sizeLimit: {{ $values.size }}
{{- else if eq $type "ephemeral" }}
- name: {{ $name }}
  ephemeral:
    volumeClaimTemplate:
      spec:
        {{- include "loraplex.claimSpec" $values | nindent 8 }}
{{- else if eq $type "claim" }}
- name: {{ $name }}
  persistentVolumeClaim:
    claimName: {{ default (printf "%s-%s" (include "loraplex.fullname" $root) $name) $values.existingClaim }}
{{- end }}
{{- end -}}

{{/* A volume that holds a model or adapters, read-only; called with its name and the values. */}}
{{- define "loraplex.contentVolume" -}}
{{- $name := index . 0 -}}
{{- $values := index . 1 -}}
{{- if $values.claim.name }}
- name: {{ $name }}
  persistentVolumeClaim:
    claimName: {{ $values.claim.name }}
    readOnly: true
{{- else if $values.image.reference }}
- name: {{ $name }}
  image:
    reference: {{ $values.image.reference }}
    pullPolicy: {{ $values.image.pullPolicy }}
{{- end }}
{{- end -}}

{{/* Its mount; called with its name, the values and the path. */}}
{{- define "loraplex.contentMount" -}}
{{- $values := index . 1 -}}
{{- if or $values.claim.name $values.image.reference }}
- name: {{ index . 0 }}
  mountPath: {{ index . 2 }}
  readOnly: true
  {{- with default $values.image.subPath $values.claim.subPath }}
  subPath: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}

{{- define "loraplex.volumes" -}}
- name: config
  configMap:
    name: {{ include "loraplex.fullname" . }}
- name: tmp
  emptyDir:
    sizeLimit: {{ .Values.tmp.size }}
- name: shm
  emptyDir:
    medium: Memory
    sizeLimit: {{ .Values.shm.size }}
{{- include "loraplex.dataVolume" (list . "state" .Values.state (include "loraplex.stateType" .)) }}
{{- include "loraplex.dataVolume" (list . "cache" .Values.cache .Values.cache.type) }}
{{- include "loraplex.contentVolume" (list "model" .Values.model) }}
{{- include "loraplex.contentVolume" (list "adapters" .Values.adapterFolder) }}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "loraplex.volumeMounts" -}}
- name: config
  mountPath: /etc/loraplex
  readOnly: true
- name: tmp
  mountPath: /tmp
- name: shm
  mountPath: /dev/shm
{{- if ne (include "loraplex.stateType" .) "none" }}
- name: state
  mountPath: /var/lib/loraplex
{{- end }}
- name: cache
  mountPath: /var/cache/loraplex
{{- include "loraplex.contentMount" (list "model" .Values.model "/model") }}
{{- include "loraplex.contentMount" (list "adapters" .Values.adapterFolder "/adapters") }}
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "loraplex.claimTemplates" -}}
{{- if eq (include "loraplex.stateType" .) "perPod" }}
- metadata:
    name: state
    labels:
      {{- include "loraplex.selectorLabels" . | nindent 6 }}
  spec:
    {{- include "loraplex.claimSpec" .Values.state | nindent 4 }}
{{- end }}
{{- if eq .Values.cache.type "perPod" }}
- metadata:
    name: cache
    labels:
      {{- include "loraplex.selectorLabels" . | nindent 6 }}
  spec:
    {{- include "loraplex.claimSpec" .Values.cache | nindent 4 }}
{{- end }}
{{- end -}}
