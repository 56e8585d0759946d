"""Files that hold keys and passwords, recognised by name or by first bytes.

They are not packed for a cluster, and a run records only the names of changed ones.
`deploy/cluster.yaml` repeats the patterns for Ray's launcher; a test compares them.
"""

from __future__ import annotations

import re

from pathspec import GitIgnoreSpec

# `.gitignore` syntax. Patterns with `!` match code, such as the package `credentials/`.
PATTERNS = (
    "*credentials", "!*credentials/", "*token", "!*token/",
    # passwords and tokens
    ".env", ".env.*", "*.env", ".envrc", ".netrc", "_netrc", ".pypirc", ".pgpass", ".htpasswd",
    ".git-credentials", ".vault-token", ".vault_pass*", ".my.cnf", ".mylogin.cnf", "pip.conf",
    ".npmrc", ".yarnrc.yml", ".condarc", ".databrickscfg", ".modal.toml", ".comet.config",
    ".boto", ".s3cfg", ".passwd-s3fs", "rclone.conf", ".dockercfg", "kaggle.json", "auth.json",
    "basic_auth.ini", ".terraformrc", "*.tfvars", "*.tfvars.json", "*.tfstate", "*.tfstate.*",
    "kubeconfig", "kubeconfig.y*ml", "*.kubeconfig", "*credentials*.json", "*credentials.y*ml",
    "*credentials.toml", "*credentials.ini", "*credentials.csv", "*credentials.txt",
    "client_secret*.json", "service[-_]account*.json", "*secret.y*ml", "*secrets.y*ml",
    "*secret.json", "*secrets.json", "*secret.toml", "*secrets.toml", "*secret.ini",
    "*secrets.ini", "*secret.txt", "*secrets.txt", "*.secret", "*.secrets", ".secrets",
    "*password.txt", "*passwords.txt", "*token.txt", "*api[-_]key",
    "*api[-_]key.txt", "*apikey", "*apikey.txt", ".*_history",
    # folders of them
    ".aws/", ".azure/", ".docker/", ".gcloud/", ".huggingface/", ".kaggle/", ".kube/", ".mc/",
    ".ngc/", ".oci/", ".pulumi/", ".ray/", ".terraform.d/", ".password-store/",
    # keys
    ".ssh/", ".gnupg/", "*.pem", "*.key", "*.p8", "*.p12", "*.pfx", "*.jks", "*.keystore",
    "*.kdbx", "*.agekey", "*.ovpn", "*.ppk", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*",
)  # fmt: skip
# First line of a key; syntax of both Python and `git grep -E`.
KEY_LINE = (
    "(-----BEGIN ([A-Z0-9]+ )*PRIVATE KEY( BLOCK)?-----|PuTTY-User-Key-File-"
    '|[{]? *"type": *"(service_account|authorized_user|external_account)"|aws_access_key_id *=)'
)
BEGINNING_BYTES = 200
_NAMES = GitIgnoreSpec.from_lines(PATTERNS)
_BEGINNING = re.compile(rb"\s*([{\[][^\n]*\n\s*)?" + KEY_LINE.encode())


def is_secret_file(path: str) -> bool:
    """Tell whether a path is that of a secret file, or (with a slash behind it) folder.

    >>> is_secret_file("deploy/fishleg.env"), is_secret_file(".aws/"), is_secret_file("secrets.py")
    (True, True, False)
    """
    return _NAMES.match_file(path)


def begins_like_key(beginning: bytes) -> bool:
    """Tell whether the first bytes of a file are those of a private key or an account key."""
    return _BEGINNING.match(beginning) is not None
