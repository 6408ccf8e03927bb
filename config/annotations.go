package config

import "fmt"

// The annotations of a pod, each for all of its containers or, as the key with
// "/container." and a container's name after it, for one.
const (
	// AnnotationPartition narrows the partition: a [Scope], or "group:" and a name.
	AnnotationPartition = "partition.selective-ksm.dev"
	// AnnotationMerge is "off", "on", or "on-demand".
	AnnotationMerge = "merge.selective-ksm.dev"
	// AnnotationInterval is the time from one merge to the next.
	AnnotationInterval = "interval.selective-ksm.dev"
	// AnnotationIncludeSecrets is "true" where memory that programs have marked as
	// secret may be merged.
	AnnotationIncludeSecrets = "include-secrets.selective-ksm.dev"
)

// Annotations are the keys of all annotations.
func Annotations() []string {
	return []string{AnnotationPartition, AnnotationMerge, AnnotationInterval, AnnotationIncludeSecrets}
}

// read reads an annotation, if the container has it. The function says what would have
// been right, and sets what otherwise holds: that which merges least.
func (a *Assignment) read(ctr Container, annotation, otherwise string, read func(value string) (wrong string)) {
	value, given := ctr.Annotations[annotation]
	if !given {
		return
	}
	if wrong := read(value); wrong != "" {
		a.ignore(ctr, annotation, fmt.Sprintf("%s: until then %s", wrong, otherwise))
	}
}

// shownValue is how much of a value is passed on: they may be as long as users like.
const shownValue = 64

func (a *Assignment) ignore(ctr Container, annotation, why string) {
	value := ctr.Annotations[annotation]
	a.Ignored = append(a.Ignored, Ignored{annotation, value[:min(len(value), shownValue)], why})
}
