"""Files that hold keys and passwords: known by their names, or by how they begin.

They are not packed for a cluster, and of what changed in them a run records their names alone.
`deploy/cluster.yaml` repeats the names for Ray's launcher, which a test compares.
"""

from __future__ import annotations

import re

from pathspec import GitIgnoreSpec

# In the language of `.gitignore`. Those with `!` are code, such as the package `credentials/`.
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
# A line that begins like this is of a key; Python and `git grep -E` both take it.
KEY_LINE = (
    "(-----BEGIN ([A-Z0-9]+ )*PRIVATE KEY( BLOCK)?-----|PuTTY-User-Key-File-"
    '|[{]? *"type": *"(service_account|authorized_user|external_account)"|aws_access_key_id *=)'
)
BEGINNING_BYTES = 200
_NAMES = GitIgnoreSpec.from_lines(PATTERNS)
_BEGINNING = re.compile(rb"\s*([{\[][^\n]*\n\s*)?" + KEY_LINE.encode())


def is_secret_file(path: str) -> bool:
    """Tell whether a path says that a file, or a folder with a slash behind it, holds secrets.

    >>> is_secret_file("deploy/fishleg.env"), is_secret_file(".aws/"), is_secret_file("secrets.py")
    (True, True, False)
    """
    return _NAMES.match_file(path)


def begins_like_key(beginning: bytes) -> bool:
    """Tell whether a file is a private key, or the key of an account, by its first bytes."""
    return _BEGINNING.match(beginning) is not None
