{{/* Values that are right each by itself and cannot be had together. The schema has checked them one by one. */}}

{{- define "loraplex.checks" -}}
{{- include "loraplex.checkModel" . -}}
{{- include "loraplex.checkState" . -}}
{{- include "loraplex.checkCache" . -}}
{{- include "loraplex.checkAuth" . -}}
{{- include "loraplex.checkStrategy" . -}}
{{- include "loraplex.checkPlacement" . -}}
{{- include "loraplex.checkScaling" . -}}
{{- include "loraplex.checkRouting" . -}}
{{- include "loraplex.checkMonitoring" . -}}
{{- end -}}

{{/* How many sources a model or an adapter folder has. */}}
{{- define "loraplex.sources" -}}
{{- $count := 0 -}}
{{- range list (get . "hub") .path .claim.name .image.reference -}}
{{- if . -}}
{{- $count = add1 $count -}}
{{- end -}}
{{- end -}}
{{- $count -}}
{{- end -}}

{{- define "loraplex.checkModel" -}}
{{- $sources := include "loraplex.sources" .Values.model | int -}}
{{- $folders := include "loraplex.sources" .Values.adapterFolder | int -}}
{{- if and .Values.demo (or (gt $sources 0) .Values.model.name (gt $folders 0)) -}}
{{- fail "demo: the demo brings its own model and adapters; set either demo or model and adapterFolder" -}}
{{- end -}}
{{- if and (not .Values.demo) (ne $sources 1) -}}
{{- fail (printf "model: set one of model.hub, model.path, model.claim.name and model.image.reference (%d are set), or demo=true" $sources) -}}
{{- end -}}
{{- if and (or .Values.model.claim.name .Values.model.image.reference) (not .Values.model.name) -}}
{{- fail "model.name: a model from a volume needs the name by which requests ask for it" -}}
{{- end -}}
{{- if gt $folders 1 -}}
{{- fail "adapterFolder: set one of adapterFolder.path, adapterFolder.claim.name and adapterFolder.image.reference" -}}
{{- end -}}
{{- if and .Values.adapterFolder.watch (eq $folders 0) -}}
{{- fail "adapterFolder.watch: there is no folder to watch; set adapterFolder.path or adapterFolder.claim.name" -}}
{{- end -}}
{{- $names := list -}}
{{- range .Values.adapters -}}
{{- if has .name $names -}}
{{- fail (printf "adapters: %s is listed twice" .name) -}}
{{- end -}}
{{- $names = append $names .name -}}
{{- end -}}
{{- if or .Values.model.image.reference .Values.adapterFolder.image.reference -}}
{{- if not (semverCompare ">=1.31-0" .Capabilities.KubeVersion.Version) -}}
{{- fail (printf "model.image, adapterFolder.image: image volumes need Kubernetes 1.31; this is %s" .Capabilities.KubeVersion.Version) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Most servers that may run at once. */}}
{{- define "loraplex.mostReplicas" -}}
{{- ternary .Values.replicas .Values.autoscaling.maxReplicas (eq .Values.autoscaling.type "none") | int -}}
{{- end -}}

{{- define "loraplex.checkState" -}}
{{- $type := include "loraplex.stateType" . -}}
{{- $most := include "loraplex.mostReplicas" . | int -}}
{{- if and (eq $type "perPod") (ne .Values.workload.kind "StatefulSet") -}}
{{- fail (printf "state.type: perPod needs workload.kind StatefulSet, not %s" .Values.workload.kind) -}}
{{- end -}}
{{- if eq $type "claim" -}}
{{- if gt $most 1 -}}
{{- fail (printf "state.type: a claim is of one server alone, and up to %d may run; set workload.kind StatefulSet with state.type perPod" $most) -}}
{{- end -}}
{{- if and (eq .Values.workload.kind "Deployment") .Values.strategy (ne (dig "type" "" .Values.strategy) "Recreate") -}}
{{- fail "strategy: with state.type claim the old server has to end before the new one starts; set strategy.type Recreate" -}}
{{- end -}}
{{- end -}}
{{- if and .Values.state.existingClaim (ne $type "claim") -}}
{{- fail (printf "state.existingClaim: needs state.type claim, not %s" $type) -}}
{{- end -}}
{{- end -}}

{{- define "loraplex.checkCache" -}}
{{- $cache := .Values.cache -}}
{{- if and (eq $cache.type "perPod") (ne .Values.workload.kind "StatefulSet") -}}
{{- fail (printf "cache.type: perPod needs workload.kind StatefulSet, not %s; ephemeral gives each pod a volume" .Values.workload.kind) -}}
{{- end -}}
{{- if and (eq $cache.type "claim") (not $cache.existingClaim) (gt (include "loraplex.mostReplicas" . | int) 1) (not (has "ReadWriteMany" $cache.accessModes)) -}}
{{- fail "cache.accessModes: several servers share a claim only with ReadWriteMany; cache.type ephemeral gives each pod a volume" -}}
{{- end -}}
{{- if and $cache.existingClaim (ne $cache.type "claim") -}}
{{- fail (printf "cache.existingClaim: needs cache.type claim, not %s" $cache.type) -}}
{{- end -}}
{{- if and (eq $cache.type "ephemeral") (not (semverCompare ">=1.21-0" .Capabilities.KubeVersion.Version)) -}}
{{- fail (printf "cache.type: ephemeral needs Kubernetes 1.21; this is %s" .Capabilities.KubeVersion.Version) -}}
{{- end -}}
{{- if not $cache.existingClaim -}}
{{- $bytes := include "loraplex.setting" (list . "disk_cache_bytes" "20GiB") | include "loraplex.bytes" | int64 -}}
{{- $size := include "loraplex.bytes" $cache.size | int64 -}}
{{- if and (gt $bytes 0) (gt $size 0) (gt $bytes $size) -}}
{{- fail (printf "cache.size: %s is less than the adapters may take (config.disk_cache_bytes, %d bytes)" $cache.size $bytes) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* A number of bytes, of a quantity or a setting with a unit; 0 where it is none. */}}
{{- define "loraplex.bytes" -}}
{{- $powers := dict "" 0 "k" 1 "m" 2 "g" 3 "t" 4 "p" 5 -}}
{{- $match := regexFind "^[0-9]+ *([kKmMgGtTpP]i?)?[bB]?$" . -}}
{{- if $match -}}
{{- $unit := regexFind "[kKmMgGtTpP]?i?[bB]?$" $match | lower | trimSuffix "b" -}}
{{- $bytes := regexFind "^[0-9]+" $match | int64 -}}
{{- $step := ternary 1024 1000 (hasSuffix "i" $unit) | int64 -}}
{{- range until (get $powers (trimSuffix "i" $unit) | int) -}}
{{- $bytes = mul $bytes $step -}}
{{- end -}}
{{- $bytes -}}
{{- else -}}
0
{{- end -}}
{{- end -}}

{{- define "loraplex.checkAuth" -}}
{{- $auth := .Values.auth -}}
{{- if and $auth.secretName (not $auth.secretKey) (not $auth.tenantsKey) -}}
{{- fail "auth.secretKey: name the key of the Secret, or auth.tenantsKey; without either all may come in" -}}
{{- end -}}
{{- if and $auth.secretName (eq $auth.secretKey $auth.tenantsKey) -}}
{{- fail "auth.tenantsKey: the two kinds of keys need keys of their own in the Secret" -}}
{{- end -}}
{{- if and $auth.tenantsKey (not $auth.secretName) -}}
{{- fail "auth.secretName: auth.tenantsKey is a key of this Secret" -}}
{{- end -}}
{{- end -}}

{{- define "loraplex.checkStrategy" -}}
{{- $kinds := dict "Deployment" (list "RollingUpdate" "Recreate") "StatefulSet" (list "RollingUpdate" "OnDelete") "LeaderWorkerSet" (list "RollingUpdate") -}}
{{- $known := get $kinds .Values.workload.kind -}}
{{- $type := dig "type" "RollingUpdate" .Values.strategy -}}
{{- if not (has $type $known) -}}
{{- fail (printf "strategy.type: a %s takes %s, not %s" .Values.workload.kind (join " or " $known) $type) -}}
{{- end -}}
{{- end -}}

{{- define "loraplex.checkPlacement" -}}
{{- $device := get .Values.config "device" -}}
{{- $wantsGpu := or (gt (int .Values.gpu.count) 0) (not (empty .Values.resourceClaims)) -}}
{{- if and (gt (int .Values.gpu.count) 0) .Values.resourceClaims -}}
{{- fail "gpu.count: ask for the GPU either by gpu.count or by resourceClaims" -}}
{{- end -}}
{{- if and $wantsGpu (eq (toString $device) "cpu") -}}
{{- fail "config.device: is cpu, and gpu.count or resourceClaims asks for a GPU" -}}
{{- end -}}
{{- if and .Values.resourceClaims (not (semverCompare ">=1.26-0" .Capabilities.KubeVersion.Version)) -}}
{{- fail (printf "resourceClaims: need Kubernetes 1.26; this is %s" .Capabilities.KubeVersion.Version) -}}
{{- end -}}
{{- $host := get .Values.config "host" | toString -}}
{{- if or (hasPrefix "127." $host) (eq $host "::1") (eq $host "localhost") -}}
{{- fail (printf "config.host: %s cannot be reached from outside the pod; leave it out, or set :: for IPv6" $host) -}}
{{- end -}}
{{- end -}}

{{- define "loraplex.checkScaling" -}}
{{- $auto := .Values.autoscaling -}}
{{- if and (ne $auto.type "none") (gt (int $auto.minReplicas) (int $auto.maxReplicas)) -}}
{{- fail (printf "autoscaling.minReplicas: %d is more than autoscaling.maxReplicas, %d" (int $auto.minReplicas) (int $auto.maxReplicas)) -}}
{{- end -}}
{{- if and (eq $auto.type "keda") (not $auto.keda.serverAddress) -}}
{{- fail "autoscaling.keda.serverAddress: set the address of the Prometheus that scrapes the servers" -}}
{{- end -}}
{{- end -}}

{{- define "loraplex.checkRouting" -}}
{{- if and (or .Values.inferencePool.enabled .Values.llmd.enabled) (ne .Values.metricsCompat "vllm") -}}
{{- fail "metricsCompat: endpoint pickers read vLLM's metrics; set metricsCompat to vllm" -}}
{{- end -}}
{{- if and .Values.inferencePool.enabled (not .Values.inferencePool.endpointPicker.name) -}}
{{- fail "inferencePool.endpointPicker.name: set the name of the endpoint picker's Service" -}}
{{- end -}}
{{- if and .Values.ingress.enabled (not .Values.ingress.hosts) -}}
{{- fail "ingress.hosts: set at least one" -}}
{{- end -}}
{{- if and .Values.httpRoute.enabled (not .Values.httpRoute.parentRefs) -}}
{{- fail "httpRoute.parentRefs: set the Gateway that the route belongs to" -}}
{{- end -}}
{{- if .Values.productionStack.enabled -}}
{{- $label := include "loraplex.baseModelLabel" . -}}
{{- if not (regexMatch "^[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?$" $label) -}}
{{- fail (printf "productionStack.baseModel: %q cannot be the value of the label `model`; set one that can" $label) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "loraplex.checkMonitoring" -}}
{{- if and .Values.monitoring.rules.enabled (not (.Files.Glob "files/rules/*.yaml")) -}}
{{- fail "monitoring.rules.enabled: this copy of the chart holds no files/rules/*.yaml" -}}
{{- end -}}
{{- if and .Values.monitoring.dashboards.enabled (not (.Files.Glob "files/dashboards/*.json")) -}}
{{- fail "monitoring.dashboards.enabled: this copy of the chart holds no files/dashboards/*.json" -}}
{{- end -}}
{{- end -}}
