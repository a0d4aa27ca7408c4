"""What a container lacked, by what it printed."""

import re

from benchmark.checking.trials import Trial

_SYMPTOMS = (
    (
        r"Name or service not known|Temporary failure in name resolution|Network is unreachable"
        r"|Could not resolve host|Failed to establish a new connection|urlopen error|getaddrinfo"
        r"|Max retries exceeded|ConnectionError",
        "it asks for the network, which is not promised: put weights and all else that is "
        "downloaded into the image",
    ),
    (
        r"Read-only file system|Permission denied|PermissionError",
        "it writes, or reads, where it may not: nothing but outputs/ and /tmp is to be written, "
        "and every file of the image is to be readable by anyone (chmod -R a+rX)",
    ),
    (
        r"Bus error|unable to mmap|unable to open shared memory|No space left on device"
        r"|insufficient shared memory",
        "it needs more shared memory: num_workers=0, or "
        "torch.multiprocessing.set_sharing_strategy('file_system')",
    ),
    (
        r"exec format error",
        "it is built for another processor: docker build --platform linux/amd64",
    ),
    (
        r"predict\.sh: No such file|open predict\.sh|open '?predict\.sh",
        "predict.sh must lie in the image's working folder: WORKDIR /workspace, COPY predict.sh .",
    ),
    (
        r"/bin/bash\S* ?:? .*no such file|\"/bin/bash\"",
        "the organisers call /bin/bash, and no ENTRYPOINT may stand before it: install bash",
    ),
    (
        r"\$'?\\r|\r: (not found|command not found)|bad interpreter",
        "a script has line ends of Windows: convert it to those of Unix",
    ),
    (
        r"No CUDA GPUs are available|Found no NVIDIA driver|libcuda\.so|CUDA driver version"
        r"|No CUDA runtime is found|Torch not compiled with CUDA|no kernel image is available",
        "it needs a GPU that is not here, or one that its CUDA fits: check it on a machine like "
        "the organisers', or let it run on the CPU where there is none",
    ),
)
"""Words of a log, and what they call for."""


def advice(trial: Trial) -> str | None:
    """What to do about a run that failed, by its log; None where that tells nothing."""
    if trial.outcome.status == "timeout":
        return (
            "find what it waits for; if it is only slow, --timeout 3600 waits as long as the "
            "challenge does"
        )
    if trial.outcome.status == "out of memory":
        return "keep fewer copies of the volume, and work slice by slice or patch by patch"
    for words, what_to_do in _SYMPTOMS:
        if re.search(words, trial.printed):
            return what_to_do
    return None
