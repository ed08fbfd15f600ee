{{/* The pod of a server, whatever the workload that makes it. */}}

{{- define "loraplex.graceSeconds" -}}
{{- $drain := addf (include "loraplex.lingerSeconds" . | float64) (include "loraplex.drainSeconds" . | float64) -}}
{{- ceil (addf $drain .Values.preStopSeconds .Values.stopMarginSeconds) -}}
{{- end -}}

{{- define "loraplex.podLabels" -}}
{{ include "loraplex.labels" . }}
{{- if or .Values.llmd.enabled .Values.inferencePool.enabled }}
llm-d.ai/engine-type: vllm
{{- end }}
{{- if .Values.productionStack.enabled }}
model: {{ include "loraplex.baseModelLabel" . | quote }}
{{- end }}
{{- with .Values.podLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "loraplex.baseModelLabel" -}}
{{- if .Values.productionStack.baseModel -}}
{{- .Values.productionStack.baseModel -}}
{{- else if .Values.demo -}}
loraplex-demo
{{- else -}}
{{- default (base (include "loraplex.modelPath" .)) .Values.model.name -}}
{{- end -}}
{{- end -}}

{{- define "loraplex.resources" -}}
{{- $resources := deepCopy .Values.resources -}}
{{- if gt (int .Values.gpu.count) 0 -}}
{{- $limits := default dict (get $resources "limits") -}}
{{- $_ := set $limits .Values.gpu.resource (int .Values.gpu.count) -}}
{{- $_ := set $resources "limits" $limits -}}
{{- end -}}
{{- with .Values.resourceClaims -}}
{{- $claims := list -}}
{{- range . -}}
{{- $claims = append $claims (dict "name" .name) -}}
{{- end -}}
{{- $_ := set $resources "claims" $claims -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{/* The Secret's keys as variables; called with a list of the root and the two names. */}}
{{- define "loraplex.keys" -}}
{{- $auth := (index . 0).Values.auth -}}
{{- $names := dict $auth.secretKey (index . 1) $auth.tenantsKey (index . 2) -}}
{{- if $auth.secretName }}
{{- range $key := list $auth.secretKey $auth.tenantsKey }}
{{- if $key }}
- name: {{ get $names $key }}
  valueFrom:
    secretKeyRef:
      name: {{ $auth.secretName }}
      key: {{ $key }}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "loraplex.env" -}}
- name: HOME
  value: /tmp
- name: XDG_CACHE_HOME
  value: /var/cache/loraplex
- name: HF_HOME
  value: /var/cache/loraplex/huggingface
- name: TRITON_CACHE_DIR
  value: /var/cache/loraplex/triton
- name: FLASHINFER_WORKSPACE_BASE
  value: /var/cache/loraplex
{{- if and (dig "limits" "cpu" "" .Values.resources) (not (get .Values.config "threads")) }}
- name: LORAPLEX_THREADS
  valueFrom:
    resourceFieldRef:
      resource: limits.cpu
{{- end }}
{{- include "loraplex.keys" (list . "LORAPLEX_API_KEYS" "LORAPLEX_TENANT_KEYS") }}
{{- with .Values.hubToken.secretName }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.Values.hubToken.secretKey }}
{{- end }}
{{- with .Values.env }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "loraplex.probes" -}}
{{- $port := include "loraplex.portName" . -}}
{{- with .Values.probes }}
startupProbe:
  httpGet:
    path: /readyz
    port: {{ $port }}
  periodSeconds: {{ .startup.periodSeconds }}
  timeoutSeconds: {{ .startup.timeoutSeconds }}
  failureThreshold: {{ ceil (divf .startup.budgetSeconds .startup.periodSeconds) }}
readinessProbe:
  httpGet:
    path: /readyz
    port: {{ $port }}
  {{- toYaml .readiness | nindent 2 }}
livenessProbe:
  httpGet:
    path: /livez
    port: {{ $port }}
  {{- toYaml .liveness | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "loraplex.container" -}}
name: loraplex
image: {{ include "loraplex.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
args: [{{ ternary "demo" "serve" .Values.demo }}, --config, /etc/loraplex/config.yaml]
ports:
  - name: {{ include "loraplex.portName" . }}
    containerPort: {{ .Values.containerPort }}
    protocol: TCP
env:
  {{- include "loraplex.env" . | nindent 2 }}
{{- $secret := .Values.objectStore.secretName }}
{{- if or $secret .Values.envFrom }}
envFrom:
  {{- with $secret }}
  - secretRef:
      name: {{ . }}
  {{- end }}
  {{- with .Values.envFrom }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
{{- include "loraplex.probes" . }}
{{- if gt (int .Values.preStopSeconds) 0 }}
lifecycle:
  preStop:
    {{- include "loraplex.preStop" . | nindent 4 }}
{{- end }}
resources:
  {{- include "loraplex.resources" . | nindent 2 }}
securityContext:
  {{- toYaml .Values.securityContext | nindent 2 }}
volumeMounts:
  {{- include "loraplex.volumeMounts" . | nindent 2 }}
{{- end -}}

{{/* Where the pod may run, in fields of its spec. */}}
{{- define "loraplex.placement" -}}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.schedulerName }}
schedulerName: {{ . }}
{{- end }}
{{- with .Values.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .Values.resourceClaims }}
resourceClaims:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- range $field := list "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" }}
{{- with get $.Values $field }}
{{ $field }}:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "loraplex.podTemplate" -}}
metadata:
  labels:
    {{- include "loraplex.podLabels" . | nindent 4 }}
  annotations:
    checksum/config: {{ include "loraplex.config" . | sha256sum }}
    kubectl.kubernetes.io/default-container: loraplex
    {{- with .Values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "loraplex.serviceAccount" . }}
  automountServiceAccountToken: false
  # A Service named loraplex would give the pod variables such as LORAPLEX_PORT, which are settings of the server.
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ include "loraplex.graceSeconds" . }}
  securityContext:
    {{- toYaml .Values.podSecurityContext | nindent 4 }}
  {{- with .Values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- with include "loraplex.placement" . | trim }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- with .Values.initContainers }}
  initContainers:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - {{- include "loraplex.container" . | nindent 6 }}
    {{- with .Values.sidecars }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  volumes:
    {{- include "loraplex.volumes" . | nindent 4 }}
{{- end -}}
