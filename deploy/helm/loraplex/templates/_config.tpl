{{/* The settings file: what stands under `config`, and what other values say. */}}

{{/* A setting as text; what is absent or null has the server's own default, which the caller knows. */}}
{{- define "loraplex.setting" -}}
{{- $given := get (index . 0).Values.config (index . 1) -}}
{{- if or (kindIs "invalid" $given) (eq (toString $given) "") -}}
{{- index . 2 -}}
{{- else if kindIs "float64" $given -}}
{{- ternary (int64 $given | toString) (toString $given) (eq (floor $given) $given) -}}
{{- else -}}
{{- $given -}}
{{- end -}}
{{- end -}}

{{- define "loraplex.drainSeconds" -}}
{{- include "loraplex.setting" (list . "drain_seconds" 30) -}}
{{- end -}}

{{- define "loraplex.lingerSeconds" -}}
{{- include "loraplex.setting" (list . "linger_seconds" 0) -}}
{{- end -}}

{{- define "loraplex.modelPath" -}}
{{- $model := .Values.model -}}
{{- if $model.hub -}}
{{- $model.hub -}}
{{- else if $model.path -}}
{{- $model.path -}}
{{- else -}}
/model
{{- end -}}
{{- end -}}

{{- define "loraplex.adapterFolder" -}}
{{- $folder := .Values.adapterFolder -}}
{{- if $folder.path -}}
{{- $folder.path -}}
{{- else if or $folder.claim.name $folder.image.reference -}}
/adapters
{{- end -}}
{{- end -}}

{{- define "loraplex.config" -}}
{{- $config := dict -}}
{{- range $key, $value := .Values.config -}}
{{- if not (kindIs "invalid" $value) -}}
{{- /* Helm holds numbers as floats, which YAML would show as 8.589934592e+09. */ -}}
{{- if and (kindIs "float64" $value) (eq (floor $value) $value) -}}
{{- $value = int64 $value -}}
{{- end -}}
{{- $_ := set $config $key $value -}}
{{- end -}}
{{- end -}}
{{- if not (hasKey $config "host") -}}
{{- $_ := set $config "host" "0.0.0.0" -}}
{{- end -}}
{{- $_ := set $config "port" (int64 .Values.containerPort) -}}
{{- if and (or (gt (int .Values.gpu.count) 0) .Values.resourceClaims) (not (hasKey $config "device")) -}}
{{- $_ := set $config "device" "cuda" -}}
{{- end -}}
{{- if ne (include "loraplex.stateType" .) "none" -}}
{{- $_ := set $config "state_dir" "/var/lib/loraplex" -}}
{{- end -}}
{{- $_ := set $config "cache_dir" "/var/cache/loraplex/adapters" -}}
{{- if not .Values.demo -}}
{{- $_ := set $config "model" (include "loraplex.modelPath" .) -}}
{{- with .Values.model.name -}}
{{- $_ := set $config "served_model_name" . -}}
{{- end -}}
{{- with include "loraplex.adapterFolder" . -}}
{{- $_ := set $config "adapters" . -}}
{{- end -}}
{{- end -}}
{{- if .Values.adapterFolder.watch -}}
{{- $_ := set $config "watch" true -}}
{{- end -}}
{{- with .Values.adapters -}}
{{- $entries := list -}}
{{- range . -}}
{{- $entries = append $entries (printf "%s=%s" .name .path) -}}
{{- end -}}
{{- $_ := set $config "adapter" $entries -}}
{{- end -}}
{{- if ne .Values.metricsCompat "none" -}}
{{- $_ := set $config "metrics_compat" .Values.metricsCompat -}}
{{- end -}}
{{- toYaml $config -}}
{{- end -}}
