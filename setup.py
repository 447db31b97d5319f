from configparser import ConfigParser
from setuptools import find_packages, setup

config = ConfigParser(delimiters='=')
config.read('settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
lib = cfg['lib_name']

setup(author=cfg['author'], license=cfg['license'], keywords=cfg['keywords'].split(),
      packages=find_packages(include=[lib, lib + '.*']), include_package_data=True,
      install_requires=cfg['requirements'].split(),
      extras_require={k.removesuffix('_requirements'): v.split() for k,v in cfg.items() if k.endswith('_requirements')},
      entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': [f'{lib}={lib}._modidx:d']})
